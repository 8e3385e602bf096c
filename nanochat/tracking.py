"""Where a stage's numbers go: the curves that the report draws, and wandb when a run name is given."""

from __future__ import annotations

from typing import Any

from nanochat.curves import log_curve
from nanochat.environment import print0
from nanochat.runtime import Runtime

DUMMY = "dummy"  # the run name that means "no wandb"


class Tracker:
    def __init__(self, stage: str, run: str, rt: Runtime, config: dict[str, Any]) -> None:
        self.stage, self.is_master = stage, rt.is_master
        self.wandb: Any = None
        if run != DUMMY and rt.is_master:
            import wandb  # optional: imported only for a named run

            project = "nanochat" if stage == "base" else f"nanochat-{stage}"
            self.wandb = wandb.init(project=project, name=run, config=config)

    def log(self, step: int, **values: float) -> None:
        if self.is_master:
            log_curve(self.stage, step, **values)
        if self.wandb is not None:
            try:
                self.wandb.log({"step": step, **values})
            except Exception as error:  # whatever it is, it must not end the run
                print0(f"warning: nothing more is logged to wandb: {error}")
                self.wandb = None

    def finish(self) -> None:
        if self.wandb is not None:
            self.wandb.finish()
