"""Stop signals: the run saves at the next boundary and says so by its exit code; a second Ctrl-C ends it at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat import checkpoint, environment, signals
from nanochat.resume import LoopState
from nanochat.runtime import Runtime
from tests.tiny_trainer import RT, assert_equal_to_the_bit, make_trainer, weights


def send(number: int, step: int):
    """An evaluation that sends this process a signal."""

    def evaluation(state: LoopState) -> None:
        if state.step == step:
            os.kill(os.getpid(), number)

    return evaluation


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_saves_ends_with_75_and_the_resumed_run_is_the_same_to_the_bit(tmp_path, number, capfd):
    whole = make_trainer(tmp_path / "whole")
    whole.run()
    stopped = make_trainer(tmp_path / "d2")
    step = stopped._step

    def signalled(state: LoopState) -> None:
        if state.step == 2:
            os.kill(os.getpid(), number)
        step(state)

    stopped._step = signalled
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        stopped.run()
    assert ended.value.code == signals.EXIT_STOPPED == 75
    assert signal.getsignal(number) is before
    assert checkpoint.steps(tmp_path / "d2") == [3]
    name = signal.Signals(number).name
    output = capfd.readouterr()
    assert f"{name}: saving at the end of this step" in output.err
    assert f"Stopped by {name} after step 3; --resume=auto goes on from here" in output.out
    resumed = make_trainer(tmp_path / "d2", resume="auto")
    resumed.run()
    assert_equal_to_the_bit(weights(resumed.model), weights(whole.model))


def test_an_evaluation_is_cut_short_and_those_after_it_are_left_out(tmp_path):
    ran: list[str] = []

    def slow(state: LoopState) -> None:
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            ran.append("not reached")

    with pytest.raises(SystemExit):
        make_trainer(tmp_path, save_every=2).run([(2, slow), (2, lambda s: ran.append(f"after {s.step}"))])
    assert ran == ["after 0"]
    assert checkpoint.steps(tmp_path) == [2]


def test_an_evaluation_of_several_ranks_ends_first(tmp_path):
    with signals.StopSignals(Runtime(RT.device, RT.dtype, world_size=2)) as stop:
        reached = False
        with stop.cutting_short():
            os.kill(os.getpid(), signal.SIGTERM)
            reached = True
    assert reached and stop.name == "SIGTERM"


def test_a_signal_after_the_last_step_loses_nothing_and_the_rest_is_done_on_resume(tmp_path):
    with pytest.raises(SystemExit):
        make_trainer(tmp_path).run([(1000, send(signal.SIGTERM, 6))])
    assert checkpoint.steps(tmp_path) == [6]
    evaluated: list[int] = []
    make_trainer(tmp_path, resume="auto").run([(1000, lambda s: evaluated.append(s.step))])
    assert evaluated == [6]


SECOND = """
import os, signal, sys, time
from nanochat.signals import StopSignals
from tests.tiny_trainer import RT
with StopSignals(RT):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("not here", flush=True)
"""


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == signals.EXIT_AT_ONCE == 130
    assert done.stdout == "still here\n"
    assert "stopped at once; what was not saved is lost" in done.stderr


def test_one_ranks_signal_stops_all(two_ranks, tmp_path):
    two_ranks(stop_on_rank_1, tmp_path)
    assert checkpoint.steps(tmp_path / "d2") == [3]


def stop_on_rank_1(rt: Runtime, folder: Path) -> None:
    trainer = make_trainer(folder / "d2", rt)
    step = trainer._step

    def signalled(state: LoopState) -> None:
        if rt.rank == 1 and state.step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        step(state)

    trainer._step = signalled
    with pytest.raises(SystemExit) as ended:
        trainer.run()
    assert ended.value.code == signals.EXIT_STOPPED


def test_a_signal_that_is_ignored_stays_so_as_under_nohup(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        make_trainer(tmp_path).run([(2, send(signal.SIGHUP, 2))])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert checkpoint.steps(tmp_path) == [6]


def test_a_closed_terminal_does_not_end_a_run(monkeypatch):
    def gone(*args: object, **kwargs: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("builtins.print", gone)
    environment.print0("step 00001")
