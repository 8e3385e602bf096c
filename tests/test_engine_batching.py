"""Requests that come, go and share prompts at any step: exact answers, bounded memory, fair order, no lost slots."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import slots
from nanochat.config import InputError
from nanochat.engine import Engine
from nanochat.kv_cache import KVCache
from nanochat.sampling import Sampling
from tests.tiny_engine import (
    TOKENIZER,
    ScriptedModel,
    naive_greedy,
    scripted_engine,
    special,
    tiny_gpt,
    tool_lover,
)

V = TOKENIZER.get_vocab_size()
BOS = TOKENIZER.get_bos_token_id()
GREEDY = Sampling(0.0)
NEW = 12  # tokens of an answer at most
KINDS = {
    "plain": {},
    "modern": {"arch": "modern"},
    "windows": {"arch": "modern", "n_layer": 3, "window_pattern": "S", "short_window": 4},
    "kernels": {"arch": "modern", "n_layer": 3, "window_pattern": "SSL", "short_window": 4},  # of a CPU: see cpu_decode
}
TRUNK = [BOS, *range(60, 90)]
PROMPTS = [TRUNK[:n] + tail for n in (1, 3, 17, 31) for tail in ([], [100], [101, 102, 103], list(range(110, 122)))]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def model_and_answers(kind: str):
    """A model, and each prompt whose naive greedy answer no rounding can change, with that answer's ids and mask."""
    if kind == "kernels":  # which are for GPT itself, not for a class that is made of it
        model = tiny_gpt(V, seed=3, **KINDS[kind])
    else:
        model = tool_lover(seed={"plain": 5, "modern": 12, "windows": 12}[kind], **KINDS[kind])
    answers = {}
    for prompt in PROMPTS:
        ids, mask = naive_greedy(model, prompt, NEW)
        top = model(torch.tensor([ids]))[0].topk(2).values
        chosen = [at - 1 for at in range(len(prompt), len(ids)) if mask[at]] + [len(ids) - 1]
        if (top[chosen, 0] - top[chosen, 1]).min() > 1e-3:
            answers[tuple(prompt)] = ids[len(prompt) :], mask[len(prompt) :]
    assert len(answers) > 10
    assert kind == "kernels" or any(0 in mask for _, mask in answers.values())
    assert kind == "kernels" or any(len(ids) < NEW for ids, _ in answers.values())
    return model, answers


def check(request, answers) -> None:
    """What a request has so far is what the naive forward gives."""
    ids, mask = answers[request.prompt]
    new = request.ids[:-1] if request.finish_reason == "stop" else request.ids
    assert (new, request.mask[: len(new)]) == (ids[: len(new)], mask[: len(new)])
    if request.finish_reason == "stop":
        assert request.ids[-1] in (BOS, special("assistant_end"))
        assert new == ids
    elif request.finish_reason == "length":
        assert len(new) == request.budget


def check_slots(engine: Engine) -> None:
    table = engine.slots
    assert [row.slot for row in table.running] == list(range(len(table.running)))
    rows = table.live + table.kept
    assert {row.slot: row for row in rows} == {i: row for i, row in enumerate(table.holders) if row is not None}
    assert set(table.contents) == set(rows)
    if table.cache is not None:
        held = [*table.cache.k, *table.cache.v, table.cache.tokens]
        assert sum(x.nbytes for x in held) <= table.cache_bytes


schedules = st.lists(
    st.tuples(st.just("submit"), st.integers(0, 99), st.integers(0, NEW))
    | st.tuples(st.just("step"), st.integers(1, 6))
    | st.tuples(st.just("cancel"), st.integers(0, 99)),
    max_size=20,
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, deadline=None)
@given(schedules, st.sampled_from([1, 3, 16, 256]), st.sampled_from([1, 4, 16]), st.sampled_from([1, 2, 5, 20]))
def test_answers_are_those_of_the_naive_forward_in_any_schedule(kind, schedule, prefill_tokens, min_shared, num_rows):
    model, answers = model_and_answers(kind)
    row_bytes = KVCache.row_bytes(model.config, max(map(len, PROMPTS)) + NEW, model.compute_dtype)
    engine = Engine(model, TOKENIZER, cache_bytes=num_rows * row_bytes)
    engine.prefill_tokens = prefill_tokens
    prompts, requests = list(answers), []
    with patch.object(slots, "MIN_SHARED", min_shared):
        for name, number, *more in [*schedule, ("step", 2000)]:
            if name == "submit":
                requests.append(engine.submit(prompts[number % len(prompts)], *more, GREEDY))
            elif name == "cancel" and requests:
                engine.cancel(requests[number % len(requests)])
            elif name == "step":
                for _ in range(number):
                    if not engine.busy:
                        break
                    before = {id(request): len(request.ids) for request in requests}
                    told = engine.step()
                    moved = [r for r in requests if len(r.ids) > before[id(r)]]
                    assert {id(r) for r in moved} <= {id(r) for r in told}
                    assert all(len(r.ids) == before[id(r)] + 1 for r in moved)
                    check_slots(engine)
    assert not engine.busy
    for request in requests:
        assert request.done
        check(request, answers)


# Sharing -----------------------------------------------------------------------------------------


def test_a_common_beginning_is_computed_once_by_prompts_that_come_together():
    engine = Engine(tiny_gpt(V), TOKENIZER)
    requests = [engine.submit([*TRUNK, 100 + i, 120], 3, GREEDY) for i in range(4)]
    while engine.busy:
        engine.step()
    assert [request.cached_tokens for request in requests] == [0, len(TRUNK), len(TRUNK), len(TRUNK)]
    assert engine.stats()["prompt_tokens"] == len(TRUNK) + 4 * 2


def test_the_next_turn_of_a_chat_finds_the_last_one_in_its_slot():
    engine = Engine(tiny_gpt(V), TOKENIZER)
    engine.terminal = set()
    first = engine.submit(TRUNK, 10, GREEDY)
    while engine.busy:
        engine.step()
    slot, turn = first.slot, [*TRUNK, *first.ids, 100, 101]
    second = engine.submit(turn, 10, GREEDY)
    while engine.busy:
        engine.step()
    assert second.cached_tokens == len(TRUNK) + 9  # the answer's last token was never fed
    assert second.slot == slot
    assert [*turn, *second.ids] == naive_greedy(engine.model, turn, 10)[0]


def test_conversations_that_take_turns_keep_their_rows_apart():
    engine = Engine(tiny_gpt(V), TOKENIZER)
    chats = [[BOS, *range(40 + 20 * i, 60 + 20 * i)] for i in range(4)]
    known = [0] * 4  # tokens of each that were fed
    for turn in range(3):
        for i, chat in enumerate(chats):
            request = engine.submit(chat, 4, GREEDY)
            while engine.busy:
                engine.step()
            assert request.cached_tokens == known[i]
            known[i] = len(chat) + len(request.ids) - 1
            chat += [*request.ids, 200 + turn]


def test_a_row_that_computes_a_shared_prompt_may_be_cancelled_on_the_way():
    engine = Engine(tiny_gpt(V), TOKENIZER)
    engine.prefill_tokens = 8
    first, second = (engine.submit(TRUNK, 5, GREEDY) for _ in range(2))
    engine.step()
    engine.step()
    engine.cancel(first)
    while engine.busy:
        engine.step()
    assert (first.finish_reason, first.ids) == ("cancelled", [])
    assert second.cached_tokens == 16
    assert [*TRUNK, *second.ids] == naive_greedy(engine.model, TRUNK, 5)[0]


def test_release_forgets_what_was_computed_with_other_weights():
    engine = Engine(tiny_gpt(V), TOKENIZER)
    engine.generate_batch(TRUNK, max_tokens=5)
    assert engine.stats()["slots"] == 0
    assert engine.slots.cache is None


# Turns and limits ---------------------------------------------------------------------------------


def test_running_rows_get_a_token_at_every_step_while_a_long_prompt_is_computed():
    engine = Engine(tiny_gpt(V), TOKENIZER)
    engine.prefill_tokens, engine.terminal = 8, set()
    short = engine.submit([BOS], 20, GREEDY)
    engine.step()
    long = engine.submit(list(range(100, 180)), 1, GREEDY)
    counts = []
    while not long.done:
        engine.step()
        counts.append(len(short.ids))
    assert counts == list(range(2, 12))  # 80 tokens, 8 at a time


def test_requests_that_do_not_fit_wait_in_their_order():
    model = tiny_gpt(V)
    engine = Engine(model, TOKENIZER, cache_bytes=2 * KVCache.row_bytes(model.config, 40, torch.float32))
    engine.terminal = set()
    requests = [engine.submit([BOS, 50 + i], max_tokens, GREEDY) for i, max_tokens in enumerate((38, 5, 38, 3, 70))]
    ended = []
    while engine.busy:
        ended += [request for request in engine.step() if request.done]
        assert engine.stats()["running"] <= 2
    assert ended == [requests[i] for i in (1, 0, 3, 2, 4)]


def test_a_request_larger_than_the_cache_is_refused_in_one_line():
    model = tiny_gpt(V)
    engine = Engine(model, TOKENIZER, cache_bytes=KVCache.row_bytes(model.config, 40, torch.float32))
    engine.submit([BOS] * 30, 10)
    with pytest.raises(InputError, match="may come to 41 tokens, but the cache holds 40"):
        engine.submit([BOS] * 30, 11)


@pytest.mark.parametrize("ids", [[-1], [BOS, V]])
def test_ids_that_the_tokenizer_does_not_have_are_refused(ids):
    with pytest.raises(InputError, match=f"not from 0 to {V - 1}"):
        Engine(tiny_gpt(V), TOKENIZER).submit(ids)


def test_small_batches_take_little_memory_of_a_large_allowance():
    model = tiny_gpt(V)
    engine = Engine(model, TOKENIZER, cache_bytes=1 << 40)
    engine.submit(TRUNK, 500, GREEDY)
    engine.step()
    assert engine.slots.cache.v[0].shape[:2] == (1, 64)


def test_a_cancelled_request_frees_its_slot_and_cancelling_twice_does_nothing():
    engine = scripted_engine(TOKENIZER, 65, 66)
    requests = [engine.submit([65], 50) for _ in range(3)]
    engine.step()
    waiting = engine.submit([66], 50)
    for request in (requests[1], waiting, waiting):
        engine.cancel(request)
    assert engine.stats()["running"] == 2
    assert engine.stats()["waiting"] == 0
    assert waiting not in engine.step()
    assert {request.finish_reason for request in (requests[1], waiting)} == {"cancelled"}


def test_a_request_for_no_tokens_ends_at_the_next_step_without_a_forward():
    engine = scripted_engine(TOKENIZER, 65, 66)
    request = engine.submit([65], 0)
    assert engine.busy
    assert engine.step() == [request]
    assert (request.finish_reason, request.ids, engine.busy) == ("length", [], False)
    assert engine.model.rows_fed == []


# Sampling -----------------------------------------------------------------------------------------


def test_rows_of_different_settings_together_get_what_each_gets_alone():
    wishes = [
        Sampling(0.0),
        Sampling(1.0, seed=1),
        Sampling(0.8, top_k=5),
        Sampling(0.8, top_p=0.9, seed=3),
        Sampling(1.2, min_p=0.1),
        Sampling(0.9, repetition_penalty=1.3),
        Sampling(1.0, logprobs=2),
    ]
    model = tiny_gpt(V)
    alone = []
    for i, wish in enumerate(wishes):
        engine = Engine(model, TOKENIZER)
        alone.append(engine.submit(TRUNK[: 10 + i], 15, wish))
        while engine.busy:
            engine.step()
    together = Engine(model, TOKENIZER)
    requests = [together.submit(TRUNK[: 10 + i], 15, wish) for i, wish in enumerate(wishes)]
    while together.busy:
        together.step()
    assert [request.ids for request in requests] == [request.ids for request in alone]
    assert [len(request.logprobs) for request in requests] == [0] * 6 + [len(requests[6].ids)]


def test_equal_prompts_of_one_seed_differ_by_their_sample_number_only():
    engine = Engine(tiny_gpt(V), TOKENIZER)
    requests = [engine.submit(TRUNK, 12, sample=n) for n in (0, 1, 0)]
    while engine.busy:
        engine.step()
    first, other, again = (request.ids for request in requests)
    assert first == again != other


def test_the_repetition_penalty_sees_prompt_and_answer():
    engine = Engine(ScriptedModel({}, V), TOKENIZER)  # all tokens alike ...
    engine.terminal = set()
    engine.model.table += 1.0  # ... with positive logits: what was seen loses
    request = engine.submit([0, 1], V - 2, Sampling(0.0, repetition_penalty=2.0))
    while engine.busy:
        engine.step()
    assert request.ids == list(range(2, V))


def test_logprobs_are_there_for_each_token_the_tools_too():
    start, end = special("python_start"), special("python_end")
    script = [65, start, *b"1+2", end]
    model = ScriptedModel(dict(pairwise(script)), V)
    engine = Engine(model, TOKENIZER)
    request = engine.submit([65], 8, Sampling(0.0, logprobs=1))
    while engine.busy:
        engine.step()
    assert request.mask == [1, 1, 1, 1, 1, 0, 0, 0]
    sure, forced = request.logprobs[:5], request.logprobs[5:]
    assert [(x.logprob, x.top) for x in sure] == [(0.0, [(i, 0.0)]) for i in script[1:]]
    assert all(x.logprob == pytest.approx(-float(torch.tensor(V).log())) for x in forced)
