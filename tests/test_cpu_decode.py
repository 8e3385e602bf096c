"""The CPU's decode step against the model's own forward, and 8-bit weights against what they stand for."""

import pytest
import torch

from nanochat.cpu_decode import CPUDecoder
from nanochat.gpt import GPT, GPTConfig
from nanochat.quantize import Int8Linear, quantize_int8

T, START = 40, 7


def make(arch: str, n_kv_head: int = 4, n_embd: int = 128, dtype: torch.dtype = torch.float32) -> GPT:
    """A model of which no part is zero."""
    torch.manual_seed(0)
    sizes = {"sequence_len": 64, "vocab_size": 101, "n_layer": 3, "n_head": 4, "n_embd": n_embd}
    model = GPT(GPTConfig(**sizes, n_kv_head=n_kv_head, arch=arch, window_pattern="SSL", short_window=10))
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(0, 0.2)
    return model.prepare("cpu", dtype).to(dtype).eval()


def largest_difference(model: GPT, rows: int = 3) -> tuple[float, float]:
    """Of the logits, decoded one by one after a prefill, from one forward over all: (ours, the model's own step)."""
    idx = torch.randint(0, 101, (rows, T), generator=torch.Generator().manual_seed(1))
    decoder = CPUDecoder(model)
    with torch.inference_mode():
        whole = model(idx)
        ours, own = model.new_cache(rows, T), model.new_cache(rows, T)
        for cache in (ours, own):
            model(idx[:, :START], cache=cache)
        off = [(0.0, 0.0)]
        for t in range(START, T):
            a = decoder.step(idx[:, t], ours) - whole[:, t]
            b = model(idx[:, t : t + 1], cache=own)[:, 0] - whole[:, t]
            off.append((a.abs().max().item(), b.abs().max().item()))
        assert torch.equal(ours.lengths, own.lengths) and torch.equal(ours.tokens, own.tokens)
    return max(a for a, _ in off), max(b for _, b in off)


@pytest.mark.parametrize("arch", ["plain", "modern"])
@pytest.mark.parametrize("n_kv_head", [4, 2])
@pytest.mark.parametrize("n_embd", [128, 80])
def test_fp32_steps_give_the_logits_of_a_whole_forward(arch: str, n_kv_head: int, n_embd: int) -> None:
    ours, _ = largest_difference(make(arch, n_kv_head, n_embd))
    assert ours < 5e-5


@pytest.mark.parametrize("arch", ["plain", "modern"])
@pytest.mark.parametrize("rows", [1, 3, 20])  # each multiplied in another way
def test_bf16_steps_are_no_further_off_than_the_models_own(arch: str, rows: int) -> None:
    ours, own = largest_difference(make(arch, dtype=torch.bfloat16), rows)
    assert ours < 1.5 * own


@pytest.mark.parametrize("arch", ["plain", "modern"])
def test_integers_decode_as_the_model_with_the_rounded_weights(arch: str) -> None:
    model = quantize_int8(make(arch, n_embd=80))  # 80: no vectors of bf16, so activations stay exact
    ours, _ = largest_difference(model)
    assert ours < 0.1


def test_an_8_bit_weight_is_off_by_half_a_step_at_most() -> None:
    weight = torch.randn(50, 64) * torch.logspace(-3, 3, 50)[:, None]
    weight[7] = 0
    linear = Int8Linear(weight)
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((linear.weight - weight).abs() <= step / 2 * 1.001).all()
    assert linear.integers.dtype == torch.int8
    x = torch.randn(3, 64)
    want = x @ linear.weight.T
    torch.testing.assert_close(linear(x) / linear.scales, want / linear.scales, rtol=0, atol=1e-2)  # of about 600


def test_prompts_lose_no_more_by_bf16_than_what_they_are_stored_in() -> None:
    torch.manual_seed(0)
    linear, x = Int8Linear(torch.randn(50, 256)), torch.randn(30, 256).bfloat16()
    want = x.double() @ linear.weight.double().T
    torch.testing.assert_close(linear(x).double(), want, rtol=2**-7, atol=1e-3)  # sums are about 16


@pytest.mark.parametrize("rows", [1, 20])
def test_the_head_alone_gives_the_models_logits(rows: int) -> None:
    model = quantize_int8(make("plain"))
    x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(1)).bfloat16().float()  # what the kernels read
    torch.testing.assert_close(CPUDecoder(model).logits(x), model.logits(x), rtol=0, atol=1e-4)


def test_quantizing_halves_the_matrices_and_keeps_the_loss_close() -> None:
    model = make("plain", n_embd=128)
    idx = torch.randint(0, 101, (4, 33))
    with torch.inference_mode():
        before = model(idx[:, :-1], targets=idx[:, 1:])
        after = quantize_int8(model)(idx[:, :-1], targets=idx[:, 1:])
    assert before != after
    assert abs(before - after) < 0.02
    assert {m.integers.dtype for m in model.modules() if isinstance(m, Int8Linear)} == {torch.int8}
    assert not [n for n, p in model.named_parameters() if "c_" in n or "lm_head" in n]
