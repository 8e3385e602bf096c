"""The arithmetic of scores: intervals, pass@k, paired tests, ChatCORE."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from nanochat.evals.chat import ChatResult, chat_core
from nanochat.evals.stats import Paired, mean_and_error, pass_at_k
from tasks.registry import BASELINES


@pytest.mark.parametrize(
    ("passed", "total", "low", "high"), [(50, 100, 0.4038, 0.5962), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)]
)
def test_the_interval_is_wilsons(passed, total, low, high):
    assert ChatResult(passed, total).interval == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 4), (6, 6)])
def test_pass_at_k_is_the_share_of_draws_of_k_samples_with_a_right_one(n, c):
    samples = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        draws = list(combinations(samples, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    for k in (0, n + 1):
        with pytest.raises(ValueError, match="cannot be estimated"):
            pass_at_k(n, c, k)


def test_the_mean_of_a_sample_has_the_error_of_a_sample():
    assert mean_and_error([0.0, 1.0]) == (0.5, 0.5)
    assert mean_and_error([1, 2, 3, 4]) == pytest.approx((2.5, (5 / 3 / 4) ** 0.5))


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (3, 3), (2, 6), (6, 2), (0, 8)])
def test_the_paired_test_counts_the_coin_tosses_at_least_as_uneven(first, second):
    tosses = list(product([0, 1], repeat=first + second))
    extreme = [t for t in tosses if abs(2 * sum(t) - len(t)) >= abs(first - second)]
    assert Paired(5, first, second, 7).p_value == pytest.approx(len(extreme) / len(tosses))


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        (0, 6, "real (p = 0.0312)"),
        (6, 0, "worse (p = 0.0312)"),
        (0, 5, "not shown (p = 0.0625)"),
        (0, 0, "not shown (p = 1.0000)"),
        (0, 20, "real (p < 0.0001)"),
    ],
)
def test_a_gain_is_real_when_chance_gives_it_in_less_than_one_of_twenty_cases(first, second, verdict):
    assert Paired(5, first, second, 7).verdict == verdict


def test_the_interval_of_a_paired_difference_is_bonett_and_prices():
    # 100 problems, 5 only before, 15 only now: (16 - 6) / 102, +- 1.96 sqrt((22/102 - (10/102)^2) / 102)
    low, high = Paired(40, 5, 15, 40).interval
    assert (low, high) == pytest.approx((0.098039 - 0.088097, 0.098039 + 0.088097), abs=1e-5)
    assert Paired(4, 0, 0, 0).interval[1] > 0.3  # no difference among four problems proves little


def test_chat_core_of_published_figures():
    accuracies = {"ARC-Challenge": 0.2807, "ARC-Easy": 0.3876, "GSM8K": 0.0455, "HumanEval": 0.0854, "MMLU": 0.3151}
    assert chat_core(accuracies, BASELINES) == pytest.approx(0.0884, abs=5e-5)
    assert chat_core({"MMLU": 0.25, "AQUA": 0.20, "GSM8K": 0.0}, BASELINES) == 0.0
