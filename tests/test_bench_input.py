"""Nonsense given to the benchmarks."""

from __future__ import annotations

import pytest

from bench import ablate, gpu_suite, inference, packed, time_to_bpb, train
from bench import checkpoint as saving_bench
from nanochat import checkpoint

NONSENSE = [
    (ablate, "--depths=0 --widths=128", "--depths=1"),
    (ablate, "--depths= --widths=", "--depths=1"),
    (ablate, "--depths=2 --widths=-128", "--widths=128"),
    (ablate, "--depths=2 --widths=129", "--widths=128"),
    (ablate, "--seeds=", "--seeds=0"),
    (ablate, "--steps=0", "at least 2"),
    (ablate, "--threads=0", "--threads=1"),
    (ablate, "--device=tpu", "cpu"),
    (ablate, "--candidates=none --add=hot:matrix_rl=1", "matrix_lr"),
    (ablate, "--head_dim=0", "head_dim=2"),
    (train, "--depths=0", "--depths=1"),
    (train, "--depths=", "--depths=1"),
    (train, "--dtypes=", "--dtypes=float32"),
    (train, "--aspect_ratio=0", "aspect_ratio=1"),
    (train, "--vocab_size=0", "vocab_size=265"),
    (train, "--sequence_len=0", "at least 1"),
    (train, "--steps=0", "--steps=1"),
    (train, "--threads=0", "--threads=1"),
    (train, "--matmul=0", "at least 1"),
    (train, "--overrides=matrix_lr=high", "matrix_lr=0.03"),
    (train, "--data=nowhere", "a folder of text files"),
    (time_to_bpb, "--depths=0", "--depths=1"),
    (time_to_bpb, "--seeds=", "--seeds=0"),
    (time_to_bpb, "--seeds=-1", "--seeds=0"),
    (time_to_bpb, "--dtypes=int4", "use one of"),
    (time_to_bpb, "--eval_every=0", "--eval_every=1"),
    (time_to_bpb, "--vocab_size=0", "vocab_size=265"),
    (time_to_bpb, "--tokens_per_step=0", "16384"),
    (time_to_bpb, "--data=nowhere", "a folder of text files"),
    (time_to_bpb, "--data=nowhere.npz", "no packed text"),
    (inference, "--depth=0", "--depth=1"),
    (inference, "--batch=", "--batch=1"),
    (inference, "--threads=0", "--threads=1"),
    (saving_bench, "--data=nowhere", "a folder of text files"),
    (saving_bench, "--depth=0", "--depth=1"),
    (gpu_suite, "--tiny --pieces=", "kernels"),
    (gpu_suite, "--tiny --seeds=", "--seeds=0"),
    (gpu_suite, "--tiny --data=nowhere", "a folder of text files"),
    (gpu_suite, "--tiny --data=nowhere.npz", "--pack"),
    (gpu_suite, "--tiny --candidates=some", "none of"),
    (gpu_suite, "--pack=p.npz --data=tinyworld --pack_rows=0", "--pack_rows=1"),
]


@pytest.mark.parametrize(("bench", "flags", "way_out"), NONSENSE, ids=lambda x: x if isinstance(x, str) else "")
def test_nonsense_ends_in_one_line_before_anything_is_built_or_trained(bench, flags, way_out, capsys, monkeypatch):
    monkeypatch.setattr(packed.Tokenizer, "train_from_iterator", lambda *args: pytest.fail("a tokenizer is trained"))
    monkeypatch.setattr(train, "in_child", lambda work: pytest.fail("a child is started"))
    monkeypatch.setattr(checkpoint, "build_model", lambda *args: pytest.fail("a model is built"))
    with pytest.raises(SystemExit) as end:
        bench.main(flags.split())
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and way_out in error
