"""Device, dtype, ranks, directories, peak FLOPs: what the environment decides."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from nanochat import environment, runtime, tracking
from nanochat.config import InputError
from nanochat.runtime import Runtime

CPU = Runtime(torch.device("cpu"), torch.float32)


def test_one_process_needs_no_launcher():
    rt = runtime.start("cpu")
    assert (rt.rank, rt.local_rank, rt.world_size, rt.is_master) == (0, 0, 1, True)
    assert rt.device == torch.device("cpu")
    assert not torch.distributed.is_initialized()


def test_the_seed_decides_what_torch_draws():
    draws = []
    for seed in (42, 42, 43):
        runtime.start("cpu", seed)
        draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(
    ("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)]
)
def test_the_compute_dtype_is_what_the_environment_says(monkeypatch, name, dtype):
    monkeypatch.setenv("NANOCHAT_DTYPE", name)
    assert runtime.start("cpu").dtype == dtype


def test_an_unknown_dtype_is_refused_with_the_known_ones(monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "fp8")
    with pytest.raises(InputError, match="NANOCHAT_DTYPE=fp8 is not known; use one of bfloat16, float16, float32"):
        runtime.start("cpu")


@pytest.mark.parametrize(("fast_bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_computes_in_bf16_only_where_its_hardware_does(monkeypatch, fast_bf16, dtype):
    monkeypatch.delenv("NANOCHAT_DTYPE")
    monkeypatch.setattr(runtime, "_cpu_has_bf16", lambda: fast_bf16)
    assert runtime.start("cpu").dtype == dtype


def test_no_device_asked_for_means_the_best_there_is(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert runtime.autodetect_device() == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.autodetect_device() == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert runtime.autodetect_device() == "cpu"


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu", "--device_type tpu is not known; use cuda, mps or cpu"),
        ("cuda", "--device_type cuda, but torch finds no GPU; use --device_type=cpu"),
        ("mps", "--device_type mps, but torch finds no Apple GPU; use --device_type=cpu"),
    ],
)
def test_a_device_that_is_not_there_is_refused_with_one_that_is(monkeypatch, device, message):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=message):
        runtime.start(device)


def test_leaving_a_group_that_was_never_joined_is_harmless():
    runtime.stop()


def test_in_one_process_reductions_are_the_identity():
    for op in ("sum", "max", "mean"):
        assert runtime.all_reduce(torch.tensor([1.0, 2.0]), op).tolist() == [1, 2]
    runtime.barrier()


def reduce_on(rt: Runtime, folder: Path) -> None:
    x = torch.tensor([1.0, 10.0]) * (rt.rank + 1)
    results = [runtime.all_reduce(x.clone(), op).tolist() for op in ("sum", "max", "mean")]
    (folder / str(rt.rank)).write_text(f"{results} {rt.world_size} {rt.is_master}")
    environment.print0(f"rank {rt.rank} speaks")


def test_two_ranks_reduce_and_only_the_first_is_master(two_ranks, tmp_path):
    two_ranks(reduce_on, tmp_path)
    reduced = "[[3.0, 30.0], [2.0, 20.0], [1.5, 15.0]]"
    assert (tmp_path / "0").read_text() == f"{reduced} 2 True"
    assert (tmp_path / "1").read_text() == f"{reduced} 2 False"


@pytest.mark.parametrize(("rank", "printed"), [(None, "hello\n"), ("0", "hello\n"), ("1", "")])
def test_print0_prints_on_the_first_rank_only(monkeypatch, capsys, rank, printed):
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    environment.print0("hello")
    assert capsys.readouterr().out == printed


def test_the_base_directory_is_made_on_demand(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "a" / "b"))
    assert environment.base_dir() == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()


def test_without_a_setting_the_base_directory_is_in_the_home_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("NANOCHAT_BASE_DIR")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert environment.base_dir() == tmp_path / ".cache" / "nanochat"


def test_a_base_directory_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file" / "base"))
    with pytest.raises(InputError, match=r"cannot make the base directory .*file/base: .*set NANOCHAT_BASE_DIR"):
        environment.base_dir()


def test_hub_and_aqua_folders_are_optional_and_must_exist(tmp_path, monkeypatch):
    assert environment.hub_dir() is None
    assert environment.aqua_dir() is None
    monkeypatch.setenv("NANOCHAT_HUB_DIR", str(tmp_path))
    assert environment.hub_dir() == tmp_path
    monkeypatch.setenv("NANOCHAT_HUB_DIR", str(tmp_path / "gone"))
    with pytest.raises(InputError, match=r"NANOCHAT_HUB_DIR=.*gone is no folder; unset it or point it at"):
        environment.hub_dir()
    (tmp_path / "aqua").mkdir()
    assert environment.aqua_dir() == tmp_path / "aqua"
    monkeypatch.setenv("AQUA_DATA_DIR", str(tmp_path))
    assert environment.aqua_dir() == tmp_path
    monkeypatch.setenv("NANOCHAT_AQUA_DIR", str(tmp_path / "gone"))
    with pytest.raises(InputError, match="NANOCHAT_AQUA_DIR="):
        environment.aqua_dir()


@pytest.mark.parametrize(
    ("gpu", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("AMD Instinct MI300X", 1.3074e15),
        ("Voodoo 2", float("inf")),  # unknown: mfu reads 0
    ],
)
def test_peak_flops_of_a_gpu_go_by_its_name_with_the_most_special_first(monkeypatch, gpu, flops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
    assert runtime.peak_flops(Runtime(torch.device("cuda", 0), torch.bfloat16)) == flops


def test_peak_flops_of_a_cpu_are_measured():
    assert 1e8 < runtime.peak_flops(CPU) < 1e15


def test_peak_memory_of_a_cpu_run_is_what_the_process_held():
    held = torch.ones(64, 2**20 // 4)  # 64 MiB
    assert runtime.peak_memory_mib(held.device) > 64


@pytest.mark.parametrize(("stage", "project"), [("base", "nanochat"), ("sft", "nanochat-sft")])
def test_a_named_run_goes_to_wandb_and_a_dummy_one_does_not(monkeypatch, stage, project):
    calls = []

    class FakeRun:
        def log(self, values):
            calls.append(("log", values))

        def finish(self):
            calls.append(("finish",))

    class FakeWandb:
        @staticmethod
        def init(**settings):
            calls.append(("init", settings))
            return FakeRun()

    monkeypatch.setitem(sys.modules, "wandb", FakeWandb)
    tracking.Tracker(stage, tracking.DUMMY, CPU, {}).log(1, loss=2.0)
    assert calls == []
    tracker = tracking.Tracker(stage, "mine", CPU, {"depth": 4})
    tracker.log(1, loss=2.0)
    tracker.finish()
    assert calls == [
        ("init", {"project": project, "name": "mine", "config": {"depth": 4}}),
        ("log", {"step": 1, "loss": 2.0}),
        ("finish",),
    ]
