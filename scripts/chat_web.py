"""Talk to a chat model in the browser, or through OpenAI's API at /v1.

python -m scripts.chat_web             # then open http://127.0.0.1:8000
python -m scripts.chat_web -n 8 -i rl  # one replica per GPU

With NANOCHAT_API_KEY set (or --api_key, which other users of the machine can see), clients must send that key.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import uvicorn

from nanochat import checkpoint, environment, runtime
from nanochat.config import InputError, flag, run_cli
from nanochat.quantize import QUANTIZED
from nanochat.server.app import Settings, create_app
from nanochat.server.engine_loop import EngineSpec
from nanochat.server.replica import EngineProcess, Replica
from nanochat.server.stopping import StoppableServer
from nanochat.tokenizer import get_tokenizer


@dataclass(frozen=True)
class ChatWebConfig:
    num_gpus: int = flag(1, "model replicas, one per GPU", short="-n")
    source: str = flag("sft", "stage whose checkpoint to load", choices=("mid", "sft", "rl"), short="-i")
    temperature: float = flag(0.8, "where a request does not say", short="-t")
    top_k: int = flag(50, "where a request does not say; 0 = off", short="-k")
    max_tokens: int = flag(512, "tokens of an answer, where a request does not say", short="-m")
    model_tag: str | None = flag(None, "checkpoint tag; None = the deepest, d4 before d4-own", short="-g")
    step: int | None = flag(None, "checkpoint step; None = the last", short="-s")
    port: int = flag(8000, "port to listen on", short="-p")
    dtype: str | None = flag(None, "compute dtype; None = the device's own", choices=tuple(runtime.DTYPES), short="-d")
    device_type: str | None = flag(None, "cuda, mps or cpu; empty = the best there is", off="")
    host: str = flag(
        "127.0.0.1", "address to listen on; unlike the reference (0.0.0.0, the whole network) this machine only"
    )
    api_key: str | None = flag(None, "key that clients must send; better in NANOCHAT_API_KEY", off="")
    context_limit: str = flag(
        "drop", "a conversation longer than the context: drop its oldest turns, or refuse", choices=("drop", "refuse")
    )
    max_queue: int = flag(256, "answers that may wait; more are told to come back later")
    max_body_bytes: int = flag(1 << 20, "size of a request")
    shutdown: str = flag("finish", "accepted requests, at SIGTERM or Ctrl-C", choices=("finish", "cancel"))
    shutdown_seconds: float = flag(30.0, "after which it is cancelled")
    quantize: str | None = flag(None, "weights of 8 bits: twice as fast on a CPU", choices=QUANTIZED, off="")
    log_text: bool = flag(False, "prompts and answers in the log")

    def __post_init__(self) -> None:
        if self.num_gpus < 1:
            raise InputError(f"--num_gpus must be at least 1, got {self.num_gpus}")
        if not 1 <= self.port <= 65535:
            raise InputError(f"--port must be from 1 to 65535, got {self.port}")
        if not 0 <= self.shutdown_seconds < float("inf"):
            raise InputError(f"--shutdown_seconds must be 0 or more, got {self.shutdown_seconds}")
        settings(self, "")  # refuses what is out of range


def settings(cfg: ChatWebConfig, model: str) -> Settings:
    return Settings(
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        max_tokens=cfg.max_tokens,
        max_queue=cfg.max_queue,
        max_body_bytes=cfg.max_body_bytes,
        drops_turns=cfg.context_limit == "drop",
        api_key=cfg.api_key or environment.api_key(),
        log_text=cfg.log_text,
        model=model,
        source=cfg.source,
    )


def load_replicas(cfg: ChatWebConfig, found: Path) -> list[Replica]:
    """One per GPU; a single one on other devices. They load the checkpoint `found`, whatever is saved later.

    Raises:
        InputError: no such checkpoint, or fewer GPUs than asked for.
    """
    device_type = cfg.device_type or runtime.autodetect_device()
    if cfg.num_gpus > 1 and (device_type != "cuda" or cfg.num_gpus > torch.cuda.device_count()):
        raise InputError(
            f"--num_gpus {cfg.num_gpus}, but there are {torch.cuda.device_count()} GPUs to use; ask for no more"
        )
    step = int(found.name.removeprefix("step_"))
    spec = EngineSpec(cfg.source, cfg.device_type, found.parent.name, step, cfg.dtype, cfg.quantize)
    replicas = [Replica(i, partial(EngineProcess, spec, i)) for i in range(cfg.num_gpus)]
    try:
        for replica in replicas:
            replica.wait()
    except BaseException:  # Ctrl-C too
        for replica in replicas:
            replica.engine.close(0)
        raise
    return replicas


def bind(host: str, port: int) -> socket.socket:
    """Before the model is loaded, for nothing if somebody else has the port.

    Raises:
        InputError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # said, or asyncio leaves TCP_NODELAY off
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a server that has ended linger
    try:
        listener.bind((host, port))
    except OSError as error:  # a host without an address is one, too
        listener.close()
        raise InputError(f"cannot listen at {host}:{port}: {error.strerror}; choose another --port or --host") from None
    return listener


def run(cfg: ChatWebConfig) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("nanochat.server").setLevel(logging.INFO)
    listener = bind(cfg.host, cfg.port)
    found = checkpoint.find(cfg.source, cfg.model_tag, cfg.step)
    app = create_app(load_replicas(cfg, found), get_tokenizer(), settings(cfg, found.parent.name))
    print(f"nanochat: open http://{cfg.host}:{cfg.port}", flush=True)
    config = uvicorn.Config(app, log_level="warning", access_log=False, ws="none")
    StoppableServer(config, app.state.pool, cfg.shutdown, cfg.shutdown_seconds).run([listener])


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(ChatWebConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
