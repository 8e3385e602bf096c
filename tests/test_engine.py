"""Generation: cached equals naive, rows are independent, the tool is obeyed, limits hold."""

from __future__ import annotations

from itertools import pairwise

import torch

torch.set_num_threads(1)

import pytest  # noqa: E402

from nanochat.config import InputError  # noqa: E402
from nanochat.engine import Engine  # noqa: E402
from nanochat.sampling import Sampling  # noqa: E402
from nanochat.scaling import ARCHS  # noqa: E402
from tests.tiny_engine import (  # noqa: E402
    ScriptedModel,
    naive_greedy,
    scripted_engine,
    special,
    tiny_gpt,
    tiny_tokenizer,
    tool_lover,
)

TOKENIZER = tiny_tokenizer()
V = TOKENIZER.get_vocab_size()
BOS = TOKENIZER.get_bos_token_id()
PROMPTS = [[BOS, *range(40, 40 + n)] for n in (0, 1, 5, 17, 30)]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_cached_generation_equals_the_naive_forward_for_64_tokens(seed, arch):
    model = tiny_gpt(V, seed=seed, arch=arch)
    sequences, masks, _ = Engine(model, TOKENIZER).generate_many(PROMPTS, max_tokens=64, temperature=0.0)
    expected = [naive_greedy(model, prompt, 64) for prompt in PROMPTS]
    assert list(zip(sequences, masks, strict=True)) == expected


@pytest.mark.parametrize("arch", ARCHS)
def test_greedy_equality_holds_through_tool_calls_and_waiting_rows(arch):
    model = tool_lover(seed={"plain": 5, "modern": 12}[arch], arch=arch)
    prompts = [[BOS, i, i + 1][: 1 + i % 3] for i in range(40, 64)]
    engine = Engine(model, TOKENIZER, cache_bytes=5 * 2 * 2 * 16 * 4 * 51)  # five rows of 3 + 48 tokens at a time
    sequences, masks, ends = engine.generate_many(prompts, max_tokens=48, temperature=0.0)
    assert list(zip(sequences, masks, strict=True)) == [naive_greedy(model, p, 48) for p in prompts]
    written = [m[len(p) :] for m, p in zip(masks, prompts, strict=True)]
    assert any(0 in mask for mask in written)  # the tool did answer
    assert 0 < ends.count(None) < len(prompts)


def test_the_tool_answer_is_forced_into_the_row_and_masked():
    start, end = special("python_start"), special("python_end")
    out, out_end, stop = special("output_start"), special("output_end"), special("assistant_end")
    script = [65, start, *b"1+2", end, 90]  # the model would go on with 90 after the call ...
    model = ScriptedModel(dict(pairwise(script)) | {out_end: 66, 66: stop}, V)
    engine = Engine(model, TOKENIZER)  # type: ignore[arg-type]
    sequences, masks, ends = engine.generate_many([[BOS, 65]], temperature=0.0)
    assert sequences == [[BOS, 65, start, *b"1+2", end, out, *b"3", out_end, 66]]  # ... but must take the answer
    assert masks == [[0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1]]
    assert ends == [stop]


def test_a_call_without_a_value_forces_nothing():
    start, end = special("python_start"), special("python_end")
    engine = scripted_engine(TOKENIZER, 65, start, *b"1+", end, 90, special("assistant_end"))
    sequences, masks = engine.generate_batch([65], temperature=0.0)
    assert sequences == [[65, start, *b"1+", end, 90]]
    assert masks == [[0, 1, 1, 1, 1, 1]]


def test_a_row_does_not_depend_on_the_other_rows():
    engine = Engine(tiny_gpt(V), TOKENIZER)
    together, _, _ = engine.generate_many(PROMPTS * 2, max_tokens=20, temperature=1.0, seed=7)
    alone = [engine.generate_many([p], max_tokens=20, temperature=1.0, seed=7)[0][0] for p in PROMPTS]
    backwards, _, _ = engine.generate_many(PROMPTS[::-1], max_tokens=20, temperature=1.0, seed=7)
    assert together[: len(PROMPTS)] == alone == backwards[::-1]
    assert together[: len(PROMPTS)] != together[len(PROMPTS) :]  # the second sample of an equal prompt is another


def test_the_seed_decides_the_sample_and_temperature_0_ignores_it():
    engine = Engine(tiny_gpt(V), TOKENIZER)
    warm = [engine.generate_batch([BOS], 2, 20, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    cold = [engine.generate_batch([BOS], 2, 20, temperature=0.0, seed=seed) for seed in (1, 2)]
    assert warm[0] == warm[1] != warm[2]
    assert cold[0] == cold[1]
    assert cold[0][0][0] == cold[0][0][1]


def test_every_row_draws_its_own_first_token():
    engine = Engine(ScriptedModel({}, V), TOKENIZER)  # type: ignore[arg-type]
    column, mask = next(engine.generate([BOS], num_samples=64))
    assert len(set(column)) > 40  # 64 draws from 300 tokens alike: about 58 differ
    assert mask == [1] * 64


def test_a_tiny_temperature_is_greedy_and_a_negative_one_refused():
    engine = Engine(tiny_gpt(V), TOKENIZER)
    greedy = engine.generate_batch([BOS], 1, 10, temperature=0.0)
    assert engine.generate_batch([BOS], 1, 10, temperature=1e-9) == greedy
    for temperature in (-0.1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="temperature"):
            engine.generate_batch([BOS], 1, 10, temperature=temperature)
    with pytest.raises(InputError, match="top_k"):
        engine.generate([BOS], top_k=-1)


def test_finished_rows_leave_the_batch_and_the_last_token_costs_no_forward():
    stop = special("assistant_end")
    chain = [65, 66, 67, 68, stop]
    engine = scripted_engine(TOKENIZER, *chain)
    _, _, ends = engine.generate_many([[67], [68], [68], [65]], temperature=0.0)
    assert ends == [stop] * 4
    # prefill of the 3 distinct prompts; the two [68] stop at once; [67] after two tokens; [65] after four
    assert engine.model.rows_fed == [3, 2, 1, 1]  # type: ignore[attr-defined]


def test_equal_prompts_are_prefilled_once():
    engine = scripted_engine(TOKENIZER, 65, 66)
    engine.generate_batch([65], num_samples=8, max_tokens=1)
    assert engine.model.rows_fed == [1]  # type: ignore[attr-defined]


def test_streamed_columns_repeat_a_finished_rows_last_token_unmasked():
    stop = special("assistant_end")
    engine = Engine(ScriptedModel({66: stop, 67: 68, 68: 69, 69: stop}, V), TOKENIZER)  # type: ignore[arg-type]
    columns = list(engine._columns([engine._request([i], None, Sampling(0.0), 0) for i in (66, 67)]))
    assert columns == [([stop, 68], [1, 1]), ([stop, 69], [0, 1]), ([stop, stop], [0, 1])]


def test_generate_streams_what_generate_batch_returns():
    engine = Engine(tool_lover(seed=5), TOKENIZER)
    settings = {"num_samples": 3, "max_tokens": 30, "temperature": 1.0, "top_k": 20, "seed": 3}
    sequences, masks = engine.generate_batch([BOS, 50], **settings)
    columns = list(engine.generate([BOS, 50], **settings))
    for row in range(3):
        new, mask = sequences[row][2:], masks[row][2:]
        assert [column[row] for column, _ in columns][: len(new)] == new
        assert [column[row] for _, column in columns][: len(new)] == mask


@pytest.mark.parametrize(("prompt_len", "new"), [(1, 63), (63, 1), (64, 0), (65, 0)])
def test_without_max_tokens_prompt_and_answer_fill_the_sequence_len(prompt_len, new):
    engine = scripted_engine(TOKENIZER, 65, sequence_len=64)  # uniform logits: never certain to stop
    engine.terminal = set()
    assert len(list(engine.generate([65] * prompt_len))) == new


@pytest.mark.parametrize(("prompt_len", "new"), [(78, 2), (79, 1), (80, 0)])
def test_with_max_tokens_a_row_ends_at_the_models_last_position(prompt_len, new):
    model = tiny_gpt(V, sequence_len=8)  # rotary tables reach 10 times as far
    engine = Engine(model, TOKENIZER)
    engine.terminal = set()
    sequences, _, ends = engine.generate_many([[65] * prompt_len, [66]], max_tokens=5)
    assert [len(s) for s in sequences] == [prompt_len + new, 6]
    assert ends == [None, None]


def test_prompts_beyond_the_limits_are_refused_in_one_line():
    engine = Engine(tiny_gpt(V, sequence_len=8), TOKENIZER)
    with pytest.raises(InputError, match="81 tokens, more than the 80 positions"):
        engine.generate_many([[65] * 81])
    with pytest.raises(InputError, match="empty"):
        engine.generate([])
    with pytest.raises(InputError, match="max_tokens"):
        engine.generate([BOS], max_tokens=-1)
    with pytest.raises(InputError, match="num_samples"):
        engine.generate([BOS], num_samples=0)


def test_no_prompts_and_no_tokens_give_nothing():
    engine = Engine(tiny_gpt(V), TOKENIZER)
    assert engine.generate_many([]) == ([], [], [])
    assert engine.generate_many([[BOS]], max_tokens=0) == ([[BOS]], [[0]], [None])


def test_ids_beyond_the_tokenizers_are_never_sampled():
    model = tiny_gpt(V + 500)
    sequences, _ = Engine(model, TOKENIZER).generate_batch([BOS], num_samples=32, max_tokens=20)
    assert max(max(s) for s in sequences) < V


def test_generation_leaves_the_model_trainable():
    model = tiny_gpt(V).requires_grad_(True)
    Engine(model, TOKENIZER).generate_batch([BOS], max_tokens=3)
    model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()
    assert model.lm_head.weight.grad is not None
