"""Drawing tokens: each setting against its definition written plainly, and rows that do not disturb each other."""

from __future__ import annotations

import math

import pytest
import torch

from nanochat.config import InputError
from nanochat.sampling import Sampling, logprobs, penalise, sample

DRAWS = 2000
UNIFORMS = [(i + 0.5) / DRAWS for i in range(DRAWS)]  # an even grid: shares come out exact to about a draw
SETTINGS = [
    Sampling(),
    Sampling(2.0),
    Sampling(0.5, top_k=3),
    Sampling(top_k=0),
    Sampling(top_k=99),
    Sampling(top_p=0.6),
    Sampling(0.7, top_p=0.9),
    Sampling(top_p=1e-9),
    Sampling(min_p=0.3),
    Sampling(1.5, min_p=1.0),
    Sampling(1.3, top_k=5, top_p=0.7, min_p=0.2),
]


def some_logits(V: int = 12, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(V, generator=torch.Generator().manual_seed(seed))


def probabilities(logits: torch.Tensor, s: Sampling) -> list[float]:
    """As the settings are defined, one id at a time."""
    weights = {i: math.exp(x / s.temperature) for i, x in enumerate(logits.tolist())}
    order = sorted(weights, key=lambda i: -weights[i])
    order = order[: s.top_k or None]
    total, nucleus, mass = sum(weights[i] for i in order), [], 0.0
    for i in order:
        if mass >= s.top_p * total:
            break
        nucleus.append(i)
        mass += weights[i]
    kept = [i for i in nucleus if weights[i] >= s.min_p * weights[order[0]]]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_shares_are_those_of_the_definition(settings):
    logits = some_logits()
    drawn = sample(logits.expand(DRAWS, -1), [settings] * DRAWS, UNIFORMS)
    shares = torch.bincount(drawn, minlength=len(logits)) / DRAWS
    expected = torch.tensor(probabilities(logits, settings))
    torch.testing.assert_close(shares, expected, atol=1.5 / DRAWS, rtol=0)
    assert not shares[expected == 0].any()


def test_a_nucleus_wider_than_the_first_candidates_is_found_whole():
    logits = 0.01 * some_logits(5000)
    drawn = sample(logits.expand(DRAWS, -1), [Sampling(top_p=0.9)] * DRAWS, UNIFORMS)
    order = torch.empty(5000, dtype=torch.int64).scatter_(0, logits.argsort(descending=True), torch.arange(5000))
    ranks = order[drawn].double()
    assert ranks.max() == pytest.approx(0.9 * 5000, rel=0.02)
    assert ranks.mean() == pytest.approx(0.45 * 5000, rel=0.02)


def test_rows_of_all_settings_together_draw_what_each_draws_alone():
    settings = [*SETTINGS, Sampling(0.0), Sampling(1e-9, top_k=4)] * 3
    logits = torch.stack([some_logits(3000, seed) for seed in range(len(settings))])
    uniforms = [(i + 0.5) / len(settings) for i in range(len(settings))]
    alone = [int(sample(logits[i : i + 1], [s], [u])) for i, (s, u) in enumerate(zip(settings, uniforms, strict=True))]
    assert sample(logits, settings, uniforms).tolist() == alone


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_random_numbers_never_pick_an_id_that_was_left_out(uniform):
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]])
    for settings in (Sampling(), Sampling(top_k=2), Sampling(top_p=0.9), Sampling(min_p=0.2)):
        assert probabilities(logits[0, :3], settings)[int(sample(logits, [settings], [uniform]))] > 0


def test_the_likeliest_is_drawn_at_temperature_0_and_near_it():
    logits = some_logits()[None]
    for temperature in (0.0, 1e-9):
        assert sample(logits, [Sampling(temperature, top_p=0.5)], [0.99]).item() == logits.argmax()


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_what_was_seen():
    logits = torch.tensor([[2.0, -2.0, 3.0, 0.5], [2.0, -2.0, 3.0, 0.5]])
    tokens = torch.tensor([[0, 1, 0, 3], [2, 2, 2, 2]])  # of the first row, the last is behind its length
    penalised = penalise(logits, tokens, [3, 4], [Sampling(repetition_penalty=2.0), Sampling()])
    assert penalised.tolist() == [[1.0, -4.0, 3.0, 0.5], [2.0, -2.0, 3.0, 0.5]]


def test_logprobs_are_of_the_chosen_and_of_as_many_of_the_likeliest_as_asked():
    logits = torch.tensor([[0.0, math.log(3), math.log(4)], [0.0, math.log(3), math.log(4)]])
    first, second = logprobs(logits, [0, 2], [2, 0])
    assert first.logprob == pytest.approx(math.log(1 / 8))
    assert first.top == [(2, pytest.approx(math.log(4 / 8))), (1, pytest.approx(math.log(3 / 8)))]
    assert (second.logprob, second.top) == (pytest.approx(math.log(4 / 8)), [])
    assert len(logprobs(logits[:1], [0], [99])[0].top) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": t} for t in (-0.1, math.nan, math.inf)),
        {"top_k": -1},
        *({"top_p": p} for p in (0.0, -1.0, 1.1, math.nan)),
        *({"min_p": p} for p in (-0.1, 1.1, math.nan)),
        *({"repetition_penalty": p} for p in (0.0, 1e-40, 11.0, -1.0, math.inf, math.nan)),
        {"logprobs": -1},
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampling(**wrong)
