"""The chat server under load: streaming HTTP clients against the engine alone with the same requests, in one run.

    python -m bench.serve --clients=64 --seconds=300 --cut=0.1    # a table and one JSON line

Clients ask one question after another; a share of them drops the line at a random moment. The server runs in a process
of its own, made by `python -m scripts.chat_web`; the engine alone runs before and after it, in a process that keeps as
many requests open. Throughput is what the engine counts, in both. Without --source a random model is made.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

from bench import common
from bench.results import ROOT, finish, in_child, table
from nanochat import checkpoint, runtime
from nanochat.config import InputError, flag, run_cli
from nanochat.data.sources import open_source
from nanochat.dialogue import load_engine
from nanochat.environment import base_dir
from nanochat.gpt import GPT, GPTConfig
from nanochat.sampling import Sampling
from nanochat.scaling import shape_from_depth
from nanochat.tokenizer import Tokenizer

WARMUP = 0.1  # share of the seconds that is not counted: caches grow, clients come out of step
ALONE = 0.15  # share of the seconds that the engine alone gets, twice
FLAT = 0.02  # growth of the server's memory in the counted time that still counts as none
END_SECONDS = 60.0  # for the server to end in
WORDS = "the cat sat on a mat and looked at seven planets while rain fell over paris in early spring".split()


@dataclass(frozen=True)
class ServeConfig:
    clients: int = flag(64, "that stream at once")
    seconds: float = flag(60.0, "of load")
    cut: float = flag(0.1, "share of the requests whose client drops the line at a random moment")
    max_tokens: int = flag(96, "longest answer; the shortest has a quarter of it")
    source: str | None = flag(None, "stage whose checkpoint to serve; None = a random model", off="")
    model_tag: str | None = flag(None, "checkpoint tag")
    depth: int = flag(4, "of the random model")
    threads: int = flag(1, "of the CPU for the model, in both runs; the clients need some too")
    seed: int = flag(0, "of questions and cuts")

    def __post_init__(self) -> None:
        for name in ("clients", "max_tokens", "depth", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)} must be at least 1; try --{name}=1")
        if not 0 <= self.cut < 1:
            raise InputError(f"--cut {self.cut} must be from 0 to below 1; try --cut=0.1")
        if not 1 <= self.seconds < float("inf"):
            raise InputError(f"--seconds {self.seconds} must be at least 1; try --seconds=60")


@dataclass(frozen=True)
class Question:
    text: str
    max_tokens: int
    cut_at: float | None  # share of an answer's usual time after which its client goes


def questions(cfg: ServeConfig, client: int) -> Iterator[Question]:
    """The same for the server and the engine alone."""
    rng = random.Random(f"{cfg.seed}/{client}")
    while True:
        text = " ".join(rng.choices(WORDS, k=rng.randint(2, 30)))
        max_tokens = rng.randint(max(1, cfg.max_tokens // 4), cfg.max_tokens)
        yield Question(text, max_tokens, rng.random() if rng.random() < cfg.cut else None)


# ---- The engine alone ---------------------------------------------------------------------------------------------


def alone(cfg: ServeConfig, seconds: float) -> dict[str, Any]:
    """Tokens a second of an engine that is asked the same. A cut ends an answer after its share of the tokens."""
    torch.set_num_threads(cfg.threads)
    engine = load_engine(cfg.source or "sft", runtime.start(), cfg.model_tag)
    asked = [questions(cfg, client) for client in range(cfg.clients)]
    running: dict[int, tuple[int, Any, int]] = {}

    def ask(client: int) -> None:
        question = next(asked[client])
        message = {"messages": [{"role": "user", "content": question.text}, {"role": "assistant", "content": ""}]}
        ids = engine.tokenizer.render_for_completion(message)
        request = engine.submit(ids, question.max_tokens, Sampling(0.8, 50, seed=client))
        share = 1.0 if question.cut_at is None else question.cut_at
        running[id(request)] = client, request, max(1, round(share * question.max_tokens))

    for client in range(cfg.clients):
        ask(client)
    begun, counted = time.perf_counter(), None
    while (now := time.perf_counter()) < begun + seconds:
        if counted is None and now > begun + WARMUP * seconds:
            counted = now, engine.stats()["generated_tokens"], time.process_time()
        for request in engine.step():
            client, _, most = running[id(request)]
            if not request.done and len(request.ids) >= most:
                engine.cancel(request)
            if request.done:
                del running[id(request)]
                ask(client)
    assert counted is not None
    tokens, wall = engine.stats()["generated_tokens"] - counted[1], now - counted[0]
    return {"tokens_per_second": tokens / wall, "cpus": (time.process_time() - counted[2]) / wall}


# ---- The server and its clients -----------------------------------------------------------------------------------


@dataclass
class Tally:
    """What the clients saw, in the counted time."""

    first: list[float] = field(default_factory=list)  # seconds to the first token
    per_token: list[float] = field(default_factory=list)  # seconds, the mean of an answer
    tokens: int = 0  # of whole answers
    chunks: int = 0
    answers: int = 0
    cuts: int = 0
    errors: list[str] = field(default_factory=list)
    usual: float = 1.0  # seconds that an answer takes


async def client(cfg: ServeConfig, http: httpx.AsyncClient, number: int, until: float, tally: Tally) -> None:
    for question in questions(cfg, number):
        if time.perf_counter() >= until:
            return
        try:
            if question.cut_at is None:
                await stream(http, question, tally)
            else:
                await asyncio.wait_for(stream(http, question, tally), question.cut_at * tally.usual)
        except asyncio.TimeoutError:
            tally.cuts += 1
        except Exception as error:
            tally.errors.append(f"{type(error).__name__}: {error}"[:200])
            await asyncio.sleep(0.1)


async def stream(http: httpx.AsyncClient, question: Question, tally: Tally) -> None:
    """One answer, checked: every chunk, the counts, and the end."""
    body = {
        "messages": [{"role": "user", "content": question.text}],
        "max_tokens": question.max_tokens,
        "temperature": 0.8,
        "top_k": 50,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begun, first, last, chunks, rest = time.perf_counter(), 0.0, 0.0, 0, b""
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"status {response.status_code}: {(await response.aread())[:100]!r}")
        async for piece in response.aiter_raw():
            *events, rest = (rest + piece).split(b"\n\n")
            chunks += len(events)
            last = time.perf_counter()
            first = first or last
    if rest or events[-1] != b"data: [DONE]":
        raise RuntimeError("the answer broke off")
    made = json.loads(events[-2][6:])["usage"]["completion_tokens"]
    if not 1 <= made <= question.max_tokens:
        raise RuntimeError(f"{made} tokens instead of {question.max_tokens}")
    tally.first.append(first - begun)
    if made > 1:
        tally.per_token.append((last - first) / (made - 1))
    tally.tokens, tally.answers, tally.chunks = tally.tokens + made, tally.answers + 1, tally.chunks + chunks
    tally.usual += 0.02 * (time.perf_counter() - begun - tally.usual)


@contextmanager
def server(cfg: ServeConfig) -> Iterator[tuple[str, psutil.Process]]:
    """(address, process) of a server for the checkpoint; its end by SIGTERM is part of the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-X",
        "faulthandler",
        "-m",
        "scripts.chat_web",
        f"--port={port}",
        f"--source={cfg.source or 'sft'}",
    ]
    if cfg.model_tag:
        command.append(f"--model_tag={cfg.model_tag}")
    env = {**os.environ, "OMP_NUM_THREADS": str(cfg.threads)}
    log = tempfile.TemporaryFile()
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                httpx.get(f"{address}/health", trust_env=False)
                break
            except httpx.ConnectError:
                if process.poll() is not None:
                    log.seek(0)
                    raise InputError(f"the server did not start: {log.read().decode()[-500:]}") from None
                time.sleep(0.1)
        yield address, psutil.Process(process.pid)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # faulthandler writes where it hangs
        if process.wait():
            log.seek(0)
            raise RuntimeError(f"the server ended with {process.returncode}: {log.read().decode()[-5000:]}")
    finally:
        process.kill()
        process.wait()
        log.close()


async def load(cfg: ServeConfig, address: str, process: psutil.Process) -> dict[str, Any]:
    tally, begun = Tally(), time.perf_counter()
    until = begun + cfg.seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=address, limits=limits, timeout=60, trust_env=False) as http:
        clients = [asyncio.ensure_future(client(cfg, http, n, until, tally)) for n in range(cfg.clients)]
        marks = []
        for at in (WARMUP, (1 + WARMUP) / 2, 1.0):  # start, middle and end of the counted time
            await asyncio.sleep(max(0.0, begun + at * cfg.seconds - time.perf_counter()))
            stats = (await http.get("/stats")).json()
            generated = sum(engine["generated_tokens"] for engine in stats["engines"])
            marks.append((time.perf_counter(), generated, *used(process)))
            if at == WARMUP:  # what was seen before does not count; errors do
                tally.first, tally.per_token, tally.answers, tally.tokens, tally.chunks = [], [], 0, 0, 0
        seen = replace(tally)
        await asyncio.gather(*clients)
        await asyncio.sleep(1)
        stats = (await http.get("/stats")).json()
    leaked = stats["running"] + stats["waiting"] + stats["open_requests"]
    leaked += sum(engine["running"] + engine["waiting"] for engine in stats["engines"])
    (start, tokens, _, cpu), (end, more_tokens, _, more_cpu) = marks[0], marks[-1]
    return {
        "tokens_per_second": (more_tokens - tokens) / (end - start),
        "answers": seen.answers,
        "cuts": tally.cuts,
        "errors": len(tally.errors),
        "first_errors": tally.errors[:3],
        "leaked_slots": leaked,
        "first_token_ms": percentiles(seen.first),
        "per_token_ms": percentiles(seen.per_token),
        "tokens_per_chunk": seen.tokens / max(1, seen.chunks),
        "rss_mib": [round(mark[2], 1) for mark in marks],
        "cpus": (more_cpu - cpu) / (end - start),
    }


def used(process: psutil.Process) -> tuple[float, float]:
    """(MiB of memory, seconds of CPU) of the server and its engines, each in a process of its own."""
    family = [process, *process.children()]
    times = [one.cpu_times() for one in family]
    return sum(one.memory_info().rss for one in family) / 2**20, sum(t.user + t.system for t in times)


def percentiles(seconds: list[float]) -> list[float]:
    """p50 and p99, in ms."""
    if len(seconds) < 2:
        return [1000 * x for x in seconds] * 2
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return [round(1000 * cuts[49], 2), round(1000 * cuts[98], 2)]


# ---- The run ------------------------------------------------------------------------------------------------------


def make_model(depth: int) -> None:
    """A random model in the base directory, with a tokenizer of tinyworld's words."""
    texts = islice(open_source("tinyworld").texts("train"), 2000)
    tokenizer = Tokenizer.train_from_iterator(texts, 4096)
    tokenizer.save(base_dir() / "tokenizer")
    shape = shape_from_depth(depth, tokenizer.get_vocab_size(), 1024)
    sizes = {name: getattr(shape, name) for name in ("sequence_len", "n_layer", "n_head", "n_kv_head", "n_embd")}
    config = GPTConfig(vocab_size=tokenizer.get_vocab_size(), **sizes)
    torch.manual_seed(0)
    model = GPT(config)
    model.init_weights()
    meta = {"model_config": config.to_dict(), "tokenizer": tokenizer.fingerprint}
    folder = base_dir() / "chatsft_checkpoints" / f"d{depth}"
    checkpoint.write(folder, 0, checkpoint.host_copy(model.state_dict()), None, meta)


def run(cfg: ServeConfig) -> dict[str, Any]:
    if cfg.source is not None:
        return measure(cfg)
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("NANOCHAT_BASE_DIR")
        os.environ["NANOCHAT_BASE_DIR"] = str(Path(folder))
        try:
            make_model(cfg.depth)
            return measure(cfg)
        finally:
            del os.environ["NANOCHAT_BASE_DIR"]
            if before is not None:
                os.environ["NANOCHAT_BASE_DIR"] = before


def measure(cfg: ServeConfig) -> dict[str, Any]:
    seconds = max(1.0, ALONE * cfg.seconds)
    by_itself = [in_child(partial(alone, cfg, seconds))]
    with server(cfg) as (address, process):
        result = asyncio.run(load(cfg, address, process))
    by_itself.append(in_child(partial(alone, cfg, seconds)))
    ratio = result["tokens_per_second"] / statistics.mean(x["tokens_per_second"] for x in by_itself)
    per_cpu = statistics.mean(x["tokens_per_second"] / x["cpus"] for x in by_itself)
    result["ratio_per_cpu"] = result["tokens_per_second"] / result["cpus"] / per_cpu
    start, _, end = result["rss_mib"]
    result["memory_is_flat"] = end <= (1 + FLAT) * start
    rows = [
        ("tokens/s", f"{result['tokens_per_second']:,.0f}"),
        ("of the engine alone, before and after", " and ".join(f"{x['tokens_per_second']:,.0f}" for x in by_itself)),
        ("ratio", f"{ratio:.2f}"),
        ("cores used, of the engine alone", f"{result['cpus']:.2f}, {by_itself[0]['cpus']:.2f}"),
        ("ratio of tokens per second of a core", f"{result['ratio_per_cpu']:.2f}"),
        ("time to first token, ms, p50 and p99", " and ".join(map(str, result["first_token_ms"]))),
        ("time per token, ms, p50 and p99", " and ".join(map(str, result["per_token_ms"]))),
        ("tokens a chunk", f"{result['tokens_per_chunk']:.1f}"),
        ("answers; lines cut", f"{result['answers']}; {result['cuts']}"),
        ("errors; leaked slots", f"{result['errors']}; {result['leaked_slots']}"),
        ("server's memory, MiB, start, middle, end", ", ".join(map(str, result["rss_mib"]))),
        (f"memory is flat (grows by at most {FLAT:.0%})", "yes" if result["memory_is_flat"] else "no"),
    ]
    plan = common.Plan(steps=1, threads=cfg.threads)
    print(f"{common.machine(plan)}; {cfg.clients} clients, {cfg.seconds:g} s")
    table(["", "value"], rows)
    for error in result["first_errors"]:
        print(f"error: {error}")
    facts = {"bench": "serve", "machine": common.machine(plan), "clients": cfg.clients, "seconds": cfg.seconds}
    result = {**facts, "cut": cfg.cut, **result, "alone": by_itself, "ratio": ratio}
    finish(result)
    return result


def main(argv: list[str] | None = None) -> None:
    run_cli(ServeConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
