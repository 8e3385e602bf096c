"""Everything that needs a GPU, in pieces, unattended.

    python -m bench.gpu_suite --pack=packed.npz --data=FOLDER --vocab_size=32768 --sequence_len=1024   # anywhere
    python -m bench.gpu_suite --data=packed.npz --results=suite.jsonl                                  # on the GPU
    python -m bench.gpu_suite --tiny                                                  # all of it in small, on a CPU

A call starts nothing that would end after --minutes, as far as finished tasks of its kind tell; the same call again
goes on behind what the results file holds, until it says that nothing is left. Pieces: kernels (against fp64), speed
(tokens/s, mfu, memory at depth 12 and 20 in bf16 and fp8; from which width fp8 pays), loader (its rate against what the
model takes), decode (recorded steps against the model's own; tokens/s and share of the memory's bandwidth at depth 20),
time (to bpb: modern against plain at depth 12), ablate (depth 8 and 12). The packed file holds rows of ids, the
validation rows and the bytes of each id: no text is needed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from bench import ablate, common, inference, kernels, time_to_bpb, train
from bench.ablate import AblateConfig
from bench.common import Plan, Setting
from bench.inference import InferenceConfig
from bench.packed import Text
from bench.results import Results, Task, default_results, finish, numbers, run_all, table, words
from bench.time_to_bpb import TimeToBpbConfig
from nanochat import fp8, runtime
from nanochat.config import InputError, flag, run_cli
from nanochat.data.loader import PackingLoader
from nanochat.data.sources import Source, open_source
from nanochat.linear import Linear
from nanochat.scaling import ARCHS
from nanochat.tokenizer import Tokenizer

PIECES = ("kernels", "speed", "loader", "decode", "time", "ablate")
FP8_WIDTHS = (768, 1024, 1280, 1536, 2048)
HEADROOM = 3.0  # the loader's tokens/s over the model's, per 8 cores


@dataclass(frozen=True)
class SuiteConfig:
    data: str | None = flag(None, "packed .npz, folder of text or source name; default with --tiny: tinyworld")
    pieces: str = flag(",".join(PIECES), "what to run")
    pack: str | None = flag(None, "write the packed text of --data into this .npz, and do nothing else")
    pack_mib: float = flag(58.0, "largest size of it")
    pack_rows: int | None = flag(None, "rows of it; default: one pass over the text")
    vocab_size: int = flag(32_768, "of the tokenizer; a packed file has its own")
    sequence_len: int = flag(1024, "context of time and ablate; a packed file has its own")
    tiny: bool = flag(False, "all sizes turned down, on a CPU")
    minutes: float = flag(9.0, "of this call")
    seeds: str = flag("0,1", "of the ablations and of time to bpb")
    candidates: str = flag("extras", "of the ablations: all, extras, recipe, none, or names")
    add: str = flag("", "further candidates: 'name: key=value; ...'")
    results: str | None = flag(None, "file of what is finished; default: <base>/bench/gpu_suite.jsonl")
    fresh: bool = flag(False, "make results of other code again")

    def __post_init__(self) -> None:
        numbers("seeds", self.seeds, 0)
        ablate.choose(AblateConfig(candidates=self.candidates, add=self.add))
        if not words(self.pieces):
            raise InputError(f"--pieces names none of {', '.join(PIECES)}")
        for piece in words(self.pieces):
            if piece not in PIECES:
                raise InputError(f"--pieces {piece!r} is none of {', '.join(PIECES)}")
        if self.pack is not None and self.data is None:
            raise InputError("--pack needs --data, the text to pack")
        if self.pack is None and not self.tiny:
            if not torch.cuda.is_available():
                raise InputError("torch finds no GPU here; use --tiny to try the suite on a CPU")
            if self.data is None and {"time", "ablate"} & {*words(self.pieces)}:
                raise InputError("no text for time and ablate; give --data=packed.npz (made with --pack) or a folder")
        if self.data is not None and self.data.endswith(".npz") and not Path(self.data).is_file():
            raise InputError(f"--data {self.data}: no such file; write it with --pack")
        if self.data is not None and not self.data.endswith(".npz"):
            open_source(self.data)

    @property
    def text_name(self) -> str:
        return self.data or "tinyworld"

    def plan(self, depth: int, dtype: str) -> Plan:
        """Of the speed piece."""
        if self.tiny:
            return Plan(2, 128, 32, 2, dtype, False, "cpu", 1)
        rows = 32 if depth <= 12 else 16
        return Plan(20, 8 * rows * 2048, 2048, rows, dtype, True, "cuda")


# ---- Speed and loader -------------------------------------------------------------------------------------------


def speed_tasks(cfg: SuiteConfig) -> list[Task]:
    found = []
    vocab_size = 256 if cfg.tiny else cfg.vocab_size
    for depth in (1, 2) if cfg.tiny else (12, 20):
        for arch in ARCHS:
            for dtype in ("bfloat16", *(["fp8"] if depth >= 20 else [])):
                plan, side = cfg.plan(depth, dtype), 64 if cfg.tiny else common.MATMUL * 4
                setting = Setting(depth, arch, 0, {"aspect_ratio": 32, "head_dim": 32} if cfg.tiny else {})
                config, recipe = common.resolve(
                    setting, vocab_size, plan.sequence_len, plan.tokens_per_step, plan.steps
                )
                spec: dict[str, Any] = {
                    "kind": "speed",
                    "config": config.to_dict(),
                    "recipe": asdict(recipe),
                    "plan": asdict(plan),
                }
                spec |= {"machine": common.machine(plan), "side": side, "depth": depth, "arch": arch, "dtype": dtype}
                work = partial(train.measure, setting, plan, vocab_size, None, 2, side)
                cost = common.flops_per_token(config) * plan.tokens_per_step
                found.append(Task(f"speed d{depth} {arch} {dtype}", spec, work, cost))
    return found


def show_speed(found: list[tuple[Task, dict[str, Any]]]) -> list[dict[str, Any]]:
    records = [{**{key: t.spec[key] for key in ("depth", "arch", "dtype")}, **r} for t, r in found]
    train.show(records)
    return records


def linear_seconds(width: int, rows: int, device: str, many: int = 20) -> dict[str, Any]:
    """Seconds of a square layer forward and backward in bf16 and fp8, the best of some tries, compiled on a GPU. The
    weight's cast to fp8, which the micro-batches of a step share, is left out."""
    found: dict[str, Any] = {}
    for name in ("bfloat16", "fp8"):
        model = torch.nn.Sequential(Linear(width, width)).to(device)
        if name == "fp8":
            fp8.convert_to_fp8(model, lambda *_: True)
        forward = torch.compile(model, dynamic=False) if device == "cuda" else model
        x = torch.randn(rows, width, device=device, dtype=torch.bfloat16, requires_grad=True)
        times = []
        for _ in range(6):  # the first compiles, and is never the best
            runtime.synchronize(x.device)
            t0 = time.perf_counter()
            for _ in range(many):
                torch.autograd.grad(forward(x), [x, *model.parameters()], x.detach())
            runtime.synchronize(x.device)
            times.append((time.perf_counter() - t0) / many)
        found[name] = min(times)
    return {**found, "ratio": found["bfloat16"] / found["fp8"]}


def fp8_tasks(cfg: SuiteConfig) -> list[Task]:
    spec = {"kind": "fp8", "rows": 16_384, "machine": common.machine(Plan(1, device="cpu" if cfg.tiny else "cuda"))}
    return [
        Task(
            f"fp8 of width {width}", {**spec, "width": width}, partial(linear_seconds, width, 16_384, "cuda"), width**2
        )
        for width in (() if cfg.tiny else FP8_WIDTHS)
    ]


def show_fp8(found: list[tuple[Task, dict[str, Any]]]) -> list[dict[str, Any]]:
    records = [{"width": task.spec["width"], **r} for task, r in found]
    head = ["width", "bf16 ms", "fp8 ms", "bf16/fp8", f"fp8 is used (from {fp8.MIN_WIDTH})"]
    rows = [(r["width"], *(f"{1e3 * r[d]:.3f}" for d in ("bfloat16", "fp8")), f"{r['ratio']:.2f}",
             "yes" if r["width"] >= fp8.MIN_WIDTH else "no") for r in records]  # fmt: skip
    if rows:
        table(head, rows)
    return records


class Held(Source):
    """The first training blocks of another source, in memory: the loader's own speed is wanted, not that of a disk or
    a generator."""

    def __init__(self, source: Source, num_blocks: int) -> None:
        self.name, self.source = source.name, source
        self.blocks = [source.read_block("train", i) for i in range(min(num_blocks, source.num_blocks("train")))]

    def num_blocks(self, split: str) -> int:
        return len(self.blocks) if split == "train" else self.source.num_blocks(split)

    def read_block(self, split: str, i: int) -> list[str]:
        return self.blocks[i] if split == "train" else self.source.read_block(split, i)

    def fingerprint(self) -> str:
        return f"{self.name}-{len(self.blocks)}"


def loader_rate(
    name: str, vocab_size: int, T: int, rows: int, blocks: int, batches: int, device: str
) -> dict[str, Any]:
    """Tokens/s of batches on the device, with a consumer that only waits; a tokenizer is trained on the same text."""
    source = Held(open_source(name), blocks)
    tokenizer = Tokenizer.train_from_iterator(source.texts("train"), vocab_size)
    loader = PackingLoader(source, "train", tokenizer, batch_size=rows, sequence_len=T, device=device)
    next(loader)  # what is packed while the first is waited for came for free, and is little
    t0 = time.perf_counter()
    tokens = sum(inputs.numel() for inputs, _ in islice(loader, batches))
    seconds = time.perf_counter() - t0
    loader.close()
    return {"tok_per_sec": tokens / seconds, "cores": common.cores()}


def loader_tasks(cfg: SuiteConfig) -> list[Task]:
    """From tinyworld, which every machine has, unless --data is text; ids of its many short words are cheap to make,
    so the rate is that of this text."""
    name = "tinyworld" if cfg.text_name.endswith(".npz") else cfg.text_name
    args = (name, 300, 32, 2, 1, 20, "cpu") if cfg.tiny else (name, 8192, 2048, 32, 32, 400, "cuda")
    spec = {"kind": "loader", "args": list(args), "machine": common.machine(Plan(1, device=args[-1]))}
    return [Task(f"loader on {name}", spec, partial(loader_rate, *args))]


def show_loader(found: list[tuple[Task, dict[str, Any]]], speed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rates = [row["tok_per_sec"] for row in speed]
    records = []
    for _, r in found:
        per_8 = r["tok_per_sec"] * 8 / r["cores"]
        records.append({**r, "tok_per_sec_per_8_cores": per_8, "headroom": per_8 / max(rates) if rates else None})
        shown = f"{per_8 / max(rates):.1f}x the fastest model (target {HEADROOM:.0f}x)" if rates else "no speed yet"
        print(f"loader: {r['tok_per_sec']:,.0f} tokens/s on {r['cores']} cores, {per_8:,.0f} on 8 of them: {shown}")
    return records


# ---- Decoding ---------------------------------------------------------------------------------------------------


def decode_tasks(cfg: SuiteConfig) -> list[Task]:
    found = []
    for arch in ARCHS:
        sizes: dict[str, Any] = {"depth": 20, "batch": "1,8,128", "weights": "bfloat16", "device": "cuda"}
        if cfg.tiny:
            sizes = {"depth": 1, "batch": "1,2", "weights": "float32", "device": "cpu", "threads": 1, "repeats": 1}
            sizes |= {"vocab_size": 300, "sequence_len": 64, "prompt": 8, "new": 2}
        config = InferenceConfig(arch=arch, **sizes)
        works = {"graphs": partial(inference.check_graphs, config, 2), "decode": partial(decode_rates, config)}
        for name, work in works.items():
            spec = {"kind": name, "arch": arch, "config": asdict(config), "machine": common.machine(config.plan)}
            found.append(Task(f"{name} d{config.depth} {arch}", spec, work))
    return found


def decode_rates(cfg: InferenceConfig) -> dict[str, Any]:
    return {"rows": inference.measure_all(cfg)}


def show_decode(found: list[tuple[Task, dict[str, Any]]]) -> list[dict[str, Any]]:
    records = []
    for task, r in found:
        record = {"kind": task.spec["kind"], "arch": task.spec["arch"], **r}
        if record["kind"] == "graphs":
            record["ok"] = r["error"] <= kernels.LIMITS[task.spec["config"]["weights"]] and r["recordings"] == 2
            print(f"{task.label}: off by {r['error']:.1e}, {r['recordings']} recorded; ok: {record['ok']}")
        else:
            inference.show(r["rows"])
        records.append(record)
    return records


# ---- Training runs ----------------------------------------------------------------------------------------------


def time_config(cfg: SuiteConfig, text: Text, minutes: float, results: Path) -> TimeToBpbConfig:
    common_flags: dict[str, Any] = {"data": cfg.text_name, "results": str(results), "time_limit": minutes}
    common_flags |= {"fresh": cfg.fresh, "seeds": cfg.seeds.split(",")[0] if cfg.tiny else cfg.seeds}
    if cfg.tiny:
        sizes: dict[str, Any] = {
            "depths": "1",
            "steps": 4,
            "horizons": "2",
            "tokens_per_step": 128,
            "device_batch_size": 2,
        }
        sizes |= {"aspect_ratio": 32, "compile": False, "device": "cpu", "threads": 1, "isolate": False}
        return TimeToBpbConfig(**common_flags, **sizes, vocab_size=300, sequence_len=32, val_documents=8)
    tokens_per_step, rows = 131_072, 32
    steps = min(250, len(text.train) * text.sequence_len // tokens_per_step)
    horizons = ",".join(str(round(steps * part)) for part in (0.5, 0.65, 0.8))
    sizes = {"depths": "12", "dtypes": "bfloat16", "steps": steps, "horizons": horizons}
    sizes |= {"tokens_per_step": tokens_per_step, "device_batch_size": rows, "device": "cuda"}
    return TimeToBpbConfig(**common_flags, **sizes, vocab_size=text.vocab_size, sequence_len=text.sequence_len)


def ablate_config(cfg: SuiteConfig, text: Text, minutes: float, results: Path) -> AblateConfig:
    common_flags: dict[str, Any] = {"data": cfg.text_name, "results": str(results), "time_limit": minutes}
    common_flags |= {"fresh": cfg.fresh, "add": cfg.add, "candidates": cfg.candidates, "seeds": cfg.seeds}
    if cfg.tiny:
        common_flags |= {"seeds": "0", "candidates": "none", "add": cfg.add or "hot: matrix_lr=0.04"}
        sizes: dict[str, Any] = {"depths": "1,2", "widths": "32,32", "head_dim": 32, "steps": 2, "tokens_per_step": 128}
        sizes |= {"device_batch_size": 2, "compile": False, "device": "cpu", "jobs": 0, "timing_rounds": 1}
        sizes |= {"dtype": "float32", "vocab_size": 300, "sequence_len": 32, "val_documents": 8}
        return AblateConfig(**common_flags, **sizes)
    steps = min(150, len(text.train) * text.sequence_len // 131_072)
    sizes = {"depths": "8,12", "widths": "512,768", "head_dim": 128, "steps": steps, "tokens_per_step": 131_072}
    sizes |= {"device_batch_size": 32, "dtype": "bfloat16", "device": "cuda"}
    return AblateConfig(**common_flags, **sizes, vocab_size=text.vocab_size, sequence_len=text.sequence_len)


def pack(cfg: SuiteConfig) -> Path:
    path = Path(cfg.pack or "")
    text = Text.pack(cfg.text_name, cfg.vocab_size, cfg.sequence_len, cfg.pack_rows)
    text.save(path, int(cfg.pack_mib * 2**20))
    kept = len(Text.load(path).train)
    size, tokens = path.stat().st_size / 2**20, kept * text.sequence_len
    print(
        f"{path}: {kept:,} of {len(text.train):,} rows, {tokens:,} tokens; {len(text.val)} to validate, {size:.1f} MiB"
    )
    return path


def run(cfg: SuiteConfig) -> dict[str, Any] | None:
    if cfg.pack is not None:
        pack(cfg)
        return None
    begun, wanted = time.perf_counter(), words(cfg.pieces)
    path = Path(cfg.results) if cfg.results else default_results("gpu_suite")
    results = Results(path)
    if cfg.tiny and cfg.data is None:  # a vocabulary of all of it would take minutes
        little = path.with_suffix(".npz")
        Text.pack(Held(open_source(cfg.text_name), 1), 300, 32, 16, 8).save(little)
        cfg = dataclasses.replace(cfg, data=str(little))
    outcome: dict[str, Any] = {"bench": "gpu_suite", "left": 0}

    def minutes() -> float:
        return max(0.0, cfg.minutes - (time.perf_counter() - begun) / 60)

    def piece(tasks: list[Task]) -> list[tuple[Task, dict[str, Any]]]:
        outcome["left"] += run_all(tasks, results, jobs=int(not cfg.tiny), time_limit=minutes(), fresh=cfg.fresh)
        return [(task, result) for task in tasks if (result := results.get(task))]

    if "kernels" in wanted:
        outcome["kernels"] = kernels.show(piece(kernels.tasks(cfg.tiny)))
    if "speed" in wanted:
        outcome["speed"] = show_speed(piece(speed_tasks(cfg)))
        outcome["fp8"] = show_fp8(piece(fp8_tasks(cfg)))
    if "loader" in wanted:
        outcome["loader"] = show_loader(piece(loader_tasks(cfg)), outcome.get("speed", []))
    if "decode" in wanted:
        outcome["decode"] = show_decode(piece(decode_tasks(cfg)))
    for name in ("time", "ablate"):
        if name in wanted:
            text = text_of(cfg)
            print(f"\n## {name}", flush=True)
            if name == "time":
                outcome[name] = time_to_bpb.run(time_config(cfg, text, minutes(), path))
            else:
                outcome[name] = ablate.run(ablate_config(cfg, text, minutes(), path))
            outcome["left"] += outcome[name]["left"]
    print(f"{outcome['left']} tasks are left: run it again" if outcome["left"] else "nothing is left", flush=True)
    finish(outcome)
    return outcome


def text_of(cfg: SuiteConfig) -> Text:
    """For its sizes; a folder is packed as far as the longest run needs it."""
    if cfg.tiny:
        return Text.open(cfg.text_name, 300, 32, 16, 8)
    num_rows = None if cfg.text_name.endswith(".npz") else 32_000
    return Text.open(cfg.text_name, cfg.vocab_size, cfg.sequence_len, num_rows)


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(SuiteConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
