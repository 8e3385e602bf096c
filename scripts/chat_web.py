"""Talk to a chat model in the browser.

python -m scripts.chat_web             # then open http://127.0.0.1:8000
python -m scripts.chat_web -n 8 -i rl  # one replica per GPU
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import uvicorn

from nanochat import runtime
from nanochat.config import InputError, flag, run_cli
from nanochat.dialogue import load_engine
from nanochat.server.app import Sampling, Worker, create_app


@dataclass(frozen=True)
class ChatWebConfig:
    num_gpus: int = flag(1, "model replicas, one per GPU", short="-n")
    source: str = flag("sft", "stage whose checkpoint to load", choices=("mid", "sft", "rl"), short="-i")
    temperature: float = flag(0.8, "where a request does not say", short="-t")
    top_k: int = flag(50, "where a request does not say; 0 = off", short="-k")
    max_tokens: int = flag(512, "tokens of an answer, where a request does not say", short="-m")
    model_tag: str | None = flag(None, "checkpoint tag; None = the deepest", short="-g")
    step: int | None = flag(None, "checkpoint step; None = the last", short="-s")
    port: int = flag(8000, "port to listen on", short="-p")
    dtype: str | None = flag(None, "compute dtype; None = the device's own", choices=tuple(runtime.DTYPES), short="-d")
    device_type: str | None = flag(None, "cuda, mps or cpu; empty = the best there is", off="")
    host: str = flag(
        "127.0.0.1", "address to listen on; unlike the reference (0.0.0.0, the whole network) this machine only"
    )

    def __post_init__(self) -> None:
        if self.num_gpus < 1:
            raise InputError(f"--num_gpus must be at least 1, got {self.num_gpus}")
        if not 1 <= self.port <= 65535:
            raise InputError(f"--port must be from 1 to 65535, got {self.port}")
        Sampling(self.temperature, self.top_k, self.max_tokens)  # refuses what is out of range


def load_workers(cfg: ChatWebConfig) -> list[Worker]:
    """One engine per GPU; a single one on other devices.

    Raises:
        InputError: no such checkpoint, or fewer GPUs than asked for.
    """
    rt = runtime.start(cfg.device_type)
    if cfg.num_gpus > 1 and (rt.device.type != "cuda" or cfg.num_gpus > torch.cuda.device_count()):
        raise InputError(
            f"--num_gpus {cfg.num_gpus}, but there are {torch.cuda.device_count()} GPUs to use; ask for no more"
        )
    workers = []
    for i in range(cfg.num_gpus):
        device = torch.device("cuda", i) if rt.device.type == "cuda" else rt.device
        engine = load_engine(cfg.source, replace(rt, device=device), cfg.model_tag, cfg.step, cfg.dtype)
        workers.append(Worker(i, engine))
    return workers


def run(cfg: ChatWebConfig) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    app = create_app(load_workers(cfg), Sampling(cfg.temperature, cfg.top_k, cfg.max_tokens))
    print(f"nanochat: open http://{cfg.host}:{cfg.port}", flush=True)
    uvicorn.run(app, host=cfg.host, port=cfg.port, log_level="warning")


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(ChatWebConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
