"""Device, dtype, ranks, directories, peak FLOPs: what the environment decides."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
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


@pytest.mark.parametrize(
    ("gain", "dtype"), [(2.2, torch.bfloat16), (1.5, torch.bfloat16), (1.49, torch.float32), (0.2, torch.float32)]
)
def test_a_cpu_computes_in_bf16_only_where_that_is_half_as_fast_again(monkeypatch, gain, dtype):
    monkeypatch.delenv("NANOCHAT_DTYPE")
    monkeypatch.setattr(runtime, "bf16_gain", lambda: gain)
    assert runtime.start("cpu").dtype == dtype


def test_the_environments_dtype_needs_no_probe(monkeypatch):
    monkeypatch.setattr(runtime, "bf16_gain", lambda: pytest.fail("probed"))
    assert runtime.start("cpu").dtype == torch.float32


def test_the_probe_compares_the_best_times_of_both_dtypes_and_leaves_the_threads_alone(monkeypatch):
    threads, seen = torch.get_num_threads(), []

    def seconds(n, dtypes, repeats):
        seen.append((dtypes, torch.get_num_threads()))
        return [0.003, 0.001]

    monkeypatch.setattr(runtime, "matmul_seconds", seconds)
    assert runtime.bf16_gain.__wrapped__() == pytest.approx(3.0)
    assert seen == [((torch.float32, torch.bfloat16), 1)]
    assert torch.get_num_threads() == threads


def test_matmuls_are_timed_in_turns_and_the_best_time_counts(monkeypatch):
    clock = iter([0, 1, 100, 103, 110, 117, 200, 205, 210, 212])  # two that warm up; then starts and ends
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: next(clock))
    assert runtime.matmul_seconds(2, (torch.float32, torch.bfloat16), 2) == [3, 2]


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


def dtype_of_master(rt: Runtime, folder: Path) -> None:
    mine = torch.bfloat16 if rt.is_master else torch.float32
    (folder / str(rt.rank)).write_text(str(runtime._agreed(mine, rt.device)))
    memory = runtime.available_memory(rt)
    (folder / f"memory{rt.rank}").write_text(f"{memory} {rt.local_world_size}")


def test_the_masters_dtype_is_everyones_and_so_is_the_least_memory(two_ranks, tmp_path):
    two_ranks(dtype_of_master, tmp_path)
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text() == "torch.bfloat16"
    memory = (tmp_path / "memory0").read_text()
    assert memory == (tmp_path / "memory1").read_text()
    assert memory.endswith(" 2")
    assert 0 < float(memory.split()[0]) < 0.6 * psutil.virtual_memory().total


@pytest.mark.parametrize(("minutes", "seconds"), [(None, 3600), ("90", 5400), ("0.5", 30)])
def test_collectives_wait_an_hour_or_as_long_as_the_environment_says(monkeypatch, minutes, seconds):
    if minutes is not None:
        monkeypatch.setenv("NANOCHAT_TIMEOUT_MINUTES", minutes)
    assert runtime.timeout().total_seconds() == seconds


@pytest.mark.parametrize("minutes", ["0", "-1", "soon", "nan", "inf"])
def test_a_timeout_that_is_none_is_refused(monkeypatch, minutes):
    monkeypatch.setenv("NANOCHAT_TIMEOUT_MINUTES", minutes)
    with pytest.raises(InputError, match=f"NANOCHAT_TIMEOUT_MINUTES={minutes} is no number of minutes above 0; unset"):
        runtime.timeout()


def test_the_timeout_is_the_groups(monkeypatch):
    joined = {}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("NANOCHAT_TIMEOUT_MINUTES", "7")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **kw: joined.update(kw))
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    runtime.start("cpu")
    assert joined["timeout"].total_seconds() == 420


def test_more_ranks_than_gpus_on_a_node_are_refused_with_as_many(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": "6", "LOCAL_RANK": "2", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="4 ranks on this node, but it has 2 GPUs; use --nproc_per_node=2"):
        runtime.start("cuda")


@pytest.mark.parametrize(
    ("capability", "refused"), [((9, 0), False), ((8, 9), False), ((8, 6), True), ((10, 0), False), ((7, 5), True)]
)
def test_fp8_needs_ada_or_hopper(monkeypatch, capability, refused):
    gpu = Runtime(torch.device("cuda", 0), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card")
    if not refused:
        return runtime.require_fp8(gpu)
    with pytest.raises(InputError, match=r"--fp8 needs a GPU of compute capability 8\.9 or more, and Some Card has"):
        runtime.require_fp8(gpu)


def test_fp8_on_a_cpu_is_refused():
    with pytest.raises(InputError, match=r"--fp8 needs a GPU .* this run is on cpu; leave it out"):
        runtime.require_fp8(CPU)


def write_group(folder: Path, limit: str, used: int, cached: int, names: tuple[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(limit)
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")


def test_the_tightest_of_the_control_groups_around_a_process_counts(tmp_path):
    v2 = ("memory.max", "memory.current")
    assert runtime._cgroup_free(tmp_path, "0::/job/step\n") == float("inf")  # no such folders
    write_group(tmp_path / "job" / "step", "max\n", 10, 0, v2)
    assert runtime._cgroup_free(tmp_path, "0::/job/step\n") == float("inf")
    write_group(tmp_path / "job", "1000\n", 700, 100, v2)
    assert runtime._cgroup_free(tmp_path, "0::/job/step\n") == 400  # files that are cached can be given up
    write_group(tmp_path / "job" / "step", "250\n", 10, 0, v2)
    assert runtime._cgroup_free(tmp_path, "0::/job/step\n") == 240
    write_group(tmp_path / "memory" / "a", "90\n", 20, 0, ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    assert runtime._cgroup_free(tmp_path, "9:cpu:/a\n8:memory:/a\n") == 70
    assert runtime._cgroup_free(tmp_path, "") == float("inf")


def test_a_ranks_memory_is_its_share_of_the_nodes(monkeypatch):
    monkeypatch.setattr(runtime, "_cgroup_free", lambda root, membership: 1000.0)
    one, four = (Runtime(torch.device("cpu"), torch.float32, local_world_size=n) for n in (1, 4))
    assert runtime.available_memory(one) == 1000
    assert runtime.available_memory(four) == 250


def allocate_too_much() -> None:
    torch.empty(1 << 50)


def torch_error() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("fail", [allocate_too_much, torch_error])
@pytest.mark.parametrize(
    ("rows", "otherwise", "message"),
    [
        (32, ["--recompute"], " with 32 rows a pass; try --device_batch_size=16"),
        (9, [], " with 9 rows a pass; try --device_batch_size=3"),
        (1, ["--recompute"], " with 1 rows a pass; try --recompute"),
        (1, [], " with 1 rows a pass; try a base model of fewer layers"),
        (None, ["--depth=2"], "; try --depth=2"),
    ],
)
def test_out_of_memory_in_training_ends_with_the_flags_that_fit(fail, rows, otherwise, message):
    with pytest.raises(InputError, match=f"^out of memory{message}$"):
        with runtime.memory_advice(rows, *otherwise):
            fail()


def test_other_errors_in_training_stay_what_they_are():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        with runtime.memory_advice(1):
            torch.ones(2, 3) @ torch.ones(2, 3)


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
