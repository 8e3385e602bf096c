"""The model: counts, first loss, causality, grouped heads, the cache against a full forward, the chunked loss."""

from __future__ import annotations

import math

import pytest
import torch

from nanochat import attention
from nanochat.config import InputError
from nanochat.gpt import GPT, GPTConfig, rope_tables, rotate
from nanochat.kv_cache import KVCache, offset_keys
from nanochat.linear import Linear, rows_to_add
from nanochat.quantize import Int8Linear
from nanochat.scaling import ARCHS, EXTRAS
from tests.conftest import tiny_gpt


def some_ids(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 50, (rows, columns), generator=torch.Generator().manual_seed(seed))


def fill(cache: KVCache, model: GPT, rows: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    """Logits of rows fed in chunks of the given widths."""
    return torch.cat([model(part, cache=cache) for part in rows.split(chunks, dim=1)], dim=1)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_the_real_model_has_as_many_parameters_as_the_formula_says(arch, n_kv_head):
    model = tiny_gpt(arch=arch, n_kv_head=n_kv_head)
    assert sum(p.numel() for p in model.parameters()) == model.config.shape.num_params


def test_parameter_names_are_those_that_other_tools_know():
    block = ["attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    expected = {f"transformer.h.{i}.{name}.weight" for i in range(2) for name in block}
    assert set(tiny_gpt().state_dict()) == expected | {"transformer.wte.weight", "lm_head.weight"}


def test_flops_of_the_formula_are_three_forwards_of_the_real_matrices_and_attention():
    model = tiny_gpt(n_kv_head=2)
    T = model.config.sequence_len
    seen = 0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            seen += 3 * 2 * module.weight.numel()  # a multiply and an add; forward, and backward twice
    seen += 3 * 2 * 2 * model.config.n_layer * model.config.n_embd * T  # scores and values against T positions
    assert seen == model.config.shape.flops_per_token


def test_the_first_loss_is_the_logarithm_of_the_vocabulary():
    model = tiny_gpt(std=None)
    loss = model(some_ids(2, 16), some_ids(2, 16, seed=2))
    assert loss.item() == pytest.approx(math.log(50), abs=1e-6)


def test_initial_weights_have_the_stated_spread():
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=8, vocab_size=500, n_layer=1, n_head=2, n_kv_head=1, n_embd=256))
    model.init_weights()
    block = model.blocks[0]
    spreads = {
        block.attn.c_q: 1 / 16,  # 256 -> 256: 1/sqrt(256)
        block.attn.c_k: math.sqrt(128 / 256) / 16,  # narrower than its input
        block.mlp.c_fc: 1 / 16,  # wider than its input: capped at 1/sqrt(fan_in)
    }
    for layer, expected in spreads.items():
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.02)
    assert model.wte.weight.std().item() == pytest.approx(1.0, rel=0.02)
    for silent in (model.lm_head, block.attn.c_proj, block.mlp.c_proj):
        assert not silent.weight.any()


@pytest.mark.parametrize("arch", ARCHS)
def test_a_later_token_cannot_change_an_earlier_logit(arch):
    model, idx = tiny_gpt(arch=arch), some_ids(2, 12)
    changed = idx.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 50
    before, after = model(idx), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=0)
    assert (before[:, 7:] != after[:, 7:]).any(dim=-1).all()


def test_a_key_of_the_modern_model_shows_in_its_slow_channels_the_token_before():
    # head size 8: channels 0 and 4, 1 and 5, ... turn together, the later ones of each half more slowly
    k = torch.arange(1.0, 25.0).view(1, 3, 1, 8)
    assert offset_keys(k)[0, :, 0].tolist() == [
        [1, 2, 0, 0, 5, 6, 0, 0],
        [9, 10, 3, 4, 13, 14, 7, 8],
        [17, 18, 11, 12, 21, 22, 15, 16],
    ]


def test_every_extra_can_stand_alone_with_a_cache_as_without():
    for extra in EXTRAS:
        model, idx = tiny_gpt(arch="modern", extras=(extra,)), some_ids(2, 9)
        with torch.no_grad():
            cached = fill(model.new_cache(2, 9), model, idx, [4, 1, 1, 3])
            torch.testing.assert_close(cached, model(idx), rtol=1e-5, atol=1e-5)


def test_a_pair_of_tokens_has_its_row_and_its_signs():
    table = tiny_gpt(arch="modern").transformer["bigram"]
    idx = torch.tensor([[7, 7, 3]])
    got = table(idx, torch.tensor([[-1, 7, 7]]))
    for t, (token, before) in enumerate([(7, -1), (7, 7), (3, 7)]):
        row = len(table.weight) - 1
        if before >= 0:
            row = ((36_313 * token) ^ (27_191 * before)) % row
        assert set(table.signs[(token ^ before) % 1024].tolist()) == {-1.0, 1.0}
        torch.testing.assert_close(got[0, t], table.weight[row] * table.signs[(token ^ before) % 1024])


def test_value_embeddings_are_on_every_second_layer_up_to_the_last():
    assert tiny_gpt(arch="modern", n_layer=4).config.shape.value_layers == [1, 3]
    assert tiny_gpt(arch="modern", n_layer=3).config.shape.value_layers == [0, 2]


@pytest.mark.parametrize("arch", ARCHS)
def test_blocks_computed_again_in_the_backward_pass_give_the_same_gradients(arch):
    idx, targets = some_ids(2, 9), some_ids(2, 9, seed=3)

    def grads(recompute: bool) -> list[torch.Tensor | None]:
        model = tiny_gpt(arch=arch)
        model.recompute = recompute
        model(idx, targets).backward()
        return [p.grad for p in model.parameters()]

    for a, b in zip(grads(False), grads(True), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_only_the_distance_between_positions_matters_to_a_rotated_score():
    cos, sin = rope_tables(40, 8)
    torch.manual_seed(0)
    q, k = torch.randn(2, 8)

    def score(at_q: int, at_k: int) -> float:
        return float(rotate(q, cos[at_q], sin[at_q]) @ rotate(k, cos[at_k], sin[at_k]))

    assert score(9, 4) == pytest.approx(score(35, 30), abs=1e-5)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)


def test_rotation_turns_the_halves_by_minus_the_angle():
    cos, sin = rope_tables(3, 4)  # angles at position 2: 2 and 2 * 10000^(-2/4) = 0.02
    turned = rotate(torch.tensor([1.0, 0.0, 0.0, 1.0]), cos[2], sin[2])
    expected = [math.cos(2), math.sin(0.02), -math.sin(2), math.cos(0.02)]
    torch.testing.assert_close(turned, torch.tensor(expected))


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One query at a time over (T, D)."""
    rows = []
    for t in range(q.size(0)):
        weights = torch.softmax(k[: t + 1] @ q[t] / math.sqrt(q.size(1)), dim=0)
        rows.append(weights @ v[: t + 1])
    return torch.stack(rows)


def test_attention_is_the_plain_loop_and_grouped_heads_share_keys_and_values():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 4, 8), torch.randn(2, 6, 2, 8), torch.randn(2, 6, 2, 8)
    y = attention.causal_attention(q, k, v)
    for row in range(2):
        for head in range(4):  # heads 0 and 1 read the first key head, 2 and 3 the second
            expected = plain_attention(q[row, :, head], k[row, :, head // 2], v[row, :, head // 2])
            torch.testing.assert_close(y[row, :, head], expected)


def test_grouped_heads_equal_a_full_model_with_repeated_key_and_value_heads():
    grouped, full = tiny_gpt(n_kv_head=2), tiny_gpt(n_kv_head=4)
    state = grouped.state_dict()
    for name, weight in state.items():
        if "c_k" in name or "c_v" in name:  # (2 * 8, 32) -> each head of 8 rows twice
            state[name] = weight.view(2, 1, 8, 32).expand(2, 2, 8, 32).reshape(32, 32)
    full.load_state_dict(state)
    torch.testing.assert_close(grouped(some_ids(2, 9)), full(some_ids(2, 9)))


@pytest.mark.parametrize("linear", [Linear(16, 8), Int8Linear(torch.randn(8, 16))], ids=["plain", "int8"])
def test_a_layer_multiplies_few_shapes_on_a_cpu_of_which_each_would_take_time_and_memory(monkeypatch, linear):
    sizes, plain = [0], torch.nn.functional.linear
    x = torch.randn(512, 1, 16, dtype=torch.bfloat16)
    wanted = linear(x)
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w: sizes.append(x.numel() // 16) or plain(x, w))
    for rows in range(513):
        torch.testing.assert_close(linear(x[:rows]), wanted[:rows])
        assert rows <= sizes[-1] <= 1.25 * rows
    assert len(set(sizes)) <= 33


def test_rows_of_zeros_that_round_a_shape_up_change_no_gradient():
    layer = Linear(16, 8)
    x, upstream = torch.randn(13, 16, dtype=torch.bfloat16, requires_grad=True), torch.randn(13, 8).bfloat16()
    plain = torch.nn.functional.linear(x, layer.weight.bfloat16())
    assert rows_to_add(x) == 1
    got, wanted = (torch.autograd.grad((y * upstream).sum(), (x, layer.weight)) for y in (layer(x), plain))
    torch.testing.assert_close(got, wanted)


def test_the_soft_cap_is_computed_in_fp32_even_in_a_bf16_model():
    model = tiny_gpt(std=2.0).prepare("cpu", torch.bfloat16)
    x = model.features(some_ids(1, 8))
    assert x.dtype == torch.bfloat16
    raw = model.lm_head(x)
    assert raw.dtype == torch.bfloat16 and raw.float().abs().max() > 15
    logits = model.logits(x)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, 15 * torch.tanh(raw.double() / 15).float(), rtol=0, atol=1e-5)
    assert logits.abs().max() <= 15


# The cache ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("n_kv_head", [4, 1])
@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 1, 5], [1, 11], [3, 9]])
@torch.no_grad()
def test_logits_with_a_cache_are_those_of_a_full_forward_however_the_tokens_are_cut(arch, n_kv_head, chunks):
    model, idx = tiny_gpt(arch=arch, n_kv_head=n_kv_head), some_ids(3, 12)
    cache = model.new_cache(batch_size=3, max_len=20)
    torch.testing.assert_close(fill(cache, model, idx, chunks), model(idx), rtol=1e-5, atol=1e-5)
    assert cache.lengths.tolist() == [12, 12, 12]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("before", [None, 0, 4])  # in a cache
@torch.no_grad()
def test_features_of_some_positions_are_those_of_all(arch, before):
    model, idx = tiny_gpt(arch=arch, n_kv_head=2), some_ids(3, 12)
    at = torch.tensor([[0, 5, 5], [7, 2, 1], [7, 7, 7]])
    cache = None if before is None else model.new_cache(batch_size=3, max_len=20)
    if before:
        model(idx[:, :before], cache=cache)
    start = before or 0
    wanted = model.features(idx[:, : start + 8])[:, start:].gather(1, at[..., None].expand(-1, -1, 32))
    found = model.features(idx[:, start : start + 8], cache, at)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    if cache is not None:  # and what comes later finds all that it needs
        rest = model.features(idx[:, start + 8 :], cache)
        torch.testing.assert_close(rest, model.features(idx)[:, start + 8 :], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_rows_of_different_lengths_in_one_padded_batch_go_on_as_if_each_were_alone(arch):
    model = tiny_gpt(arch=arch, n_kv_head=2)
    lengths, extra = torch.tensor([3, 7, 1, 5]), 6
    rows = some_ids(4, 7 + extra)
    cache = model.new_cache(batch_size=4, max_len=7 + extra)
    prompt = rows[:, :7].clone()
    prompt[torch.arange(7) >= lengths[:, None]] = 49  # right padding, whatever it is
    prefill = model(prompt, cache=cache)
    cache.lengths = lengths.clone()
    follow = torch.stack([rows[i, n : n + extra] for i, n in enumerate(lengths)])
    cached = fill(cache, model, follow, [1, 3, 2])
    for i, n in enumerate(lengths.tolist()):
        alone = model(rows[i : i + 1, : n + extra])[0]
        torch.testing.assert_close(prefill[i, :n], alone[:n], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(cached[i], alone[n:], rtol=1e-5, atol=1e-5)
    assert cache.lengths.tolist() == [9, 13, 7, 11]


@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_rows_of_a_cache_can_be_copied_swapped_and_moved_to_a_larger_one(arch):
    model, idx = tiny_gpt(arch=arch), some_ids(3, 8)
    cache = model.new_cache(batch_size=3, max_len=5)
    model(idx[:2, :5], cache=cache.at([0, 1], [0, 0]))
    cache.copy_row(0, 2, 3)  # the first 3 tokens of row 0 ...
    cache.swap_rows(0, 1, 5)
    cache.resize([2, 0, 1], num_rows=5, max_len=9)
    assert cache.max_len == 9
    rows = torch.cat((torch.cat((idx[:1, :3], idx[2:, 3:]), dim=1), idx[1:2], idx[:1]))  # ... and others behind them
    full = model(rows)
    head = model(rows[:1, 3:5], cache=cache.at([0], [3]))
    torch.testing.assert_close(head, full[:1, 3:5], rtol=1e-5, atol=1e-5)
    # rows that lie apart, in any order
    cached = model(rows[[2, 0], 5:], cache=cache.at([2, 0], [5, 5]))
    torch.testing.assert_close(cached, full[[2, 0], 5:], rtol=1e-5, atol=1e-5)
    cached = model(rows[1:2, 5:], cache=cache.at([1], [5]))
    torch.testing.assert_close(cached, full[1:2, 5:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_short_windows_hide_what_is_further_back_with_a_cache_as_without():
    model, idx = tiny_gpt(n_layer=3, window_pattern="S", short_window=4, sequence_len=16), some_ids(2, 12)
    assert [block.attn.window for block in model.blocks] == [4, 4, None]  # the last layer sees all
    full = model(idx)
    torch.testing.assert_close(fill(model.new_cache(2, 12), model, idx, [7, 1, 4]), full, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(full, tiny_gpt(n_layer=3, sequence_len=16)(idx))
    model.blocks[-1].attn.window = 4  # now a position sees 3 x 4 back at most
    other = idx.clone()
    other[:, 0] = (other[:, 0] + 1) % 50
    long = torch.cat((idx, idx), dim=1), torch.cat((other, idx), dim=1)
    before, after = (model(ids) for ids in long)
    torch.testing.assert_close(before[:, 13:], after[:, 13:], rtol=0, atol=0)
    assert (before[:, 12] != after[:, 12]).any()


def test_the_short_window_stays_when_the_context_changes():
    config = GPTConfig(sequence_len=2048, window_pattern="SSSL")
    assert config.short_window == 512
    assert GPTConfig(**{**config.to_dict(), "sequence_len": 256}).short_window == 512


def test_a_context_beyond_ten_times_the_trained_length_is_refused_with_both_numbers():
    model = tiny_gpt(sequence_len=2)
    assert model(some_ids(1, 20)).shape == (1, 20, 50)
    with pytest.raises(InputError, match=r"21 tokens is beyond the 20 positions"):
        model(some_ids(1, 21))
    cache = model.new_cache(1, 30)
    model(some_ids(1, 20), cache=cache)
    with pytest.raises(InputError, match=r"21 tokens"):
        model(some_ids(1, 1), cache=cache)


def test_another_sequence_length_keeps_the_weights_and_moves_the_limit():
    model, idx = tiny_gpt(sequence_len=2), some_ids(1, 20)
    before = model(idx)
    model.resize(GPTConfig(**{**model.config.to_dict(), "sequence_len": 4}))
    torch.testing.assert_close(model(idx), before, rtol=0, atol=0)
    assert model(some_ids(1, 40)).shape == (1, 40, 50)


# The loss ----------------------------------------------------------------------------------------


def masked_targets() -> torch.Tensor:
    targets = some_ids(3, 11, seed=5)
    targets[0, :4] = targets[2, 7:] = -1
    return targets


def test_the_loss_is_the_mean_over_counted_targets_only():
    model, idx, targets = tiny_gpt(), some_ids(3, 11), masked_targets()
    log_p = torch.log_softmax(model(idx).double(), dim=-1)
    picked = [-log_p[b, t, targets[b, t]] for b in range(3) for t in range(11) if targets[b, t] != -1]
    assert len(picked) == 25
    assert model(idx, targets).item() == pytest.approx(torch.stack(picked).mean().item(), abs=1e-6)
    assert model(idx, targets, reduction="sum").item() == pytest.approx(torch.stack(picked).sum().item(), abs=1e-4)
    each = model(idx, targets, reduction="none")
    assert each.shape == (33,)
    assert each.view(3, 11)[targets == -1].tolist() == [0.0] * 8


def test_the_sum_over_no_target_is_zero():
    assert tiny_gpt()(some_ids(1, 4), torch.full((1, 4), -1), reduction="sum").item() == 0


# Sizes that cannot be ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(n_embd=100, n_head=3, n_kv_head=3), "n_embd 100 does not give 3 heads"),
        (dict(n_embd=9, n_head=3, n_kv_head=3), "heads of an even size"),
        (dict(n_head=6, n_kv_head=4), "n_head 6 is no multiple of n_kv_head 4"),
        (dict(arch="mamba"), "arch 'mamba' is not known; use one of"),
        (dict(arch="modern", extras=("moe",)), "extras .'moe'. are not known; use some of lambdas"),
    ],
)
def test_impossible_sizes_are_refused_by_name(sizes, message):
    with pytest.raises(InputError, match=message):
        GPTConfig(**sizes)
