"""The policy gradient against plain twins: advantages, which tokens learn, the clipped ratio, the KL to the start."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from nanochat.gpt import GPT
from nanochat.policy_gradient import Batch, PolicyLoss, advantages, batches, divergence
from nanochat.rollouts import Rollouts
from nanochat.trainer import accumulate
from tests.conftest import tiny_gpt

CPU = torch.device("cpu")
PAD = 49


def rollouts(rewards: list[list[float]], sequences: list[list[int]], masks: list[list[int]]) -> Rollouts:
    """Prompts of two tokens."""
    n, rows = len(rewards), len(sequences)
    return Rollouts(
        indices=list(range(n)),
        conversations=[{"messages": []}] * n,
        prompt_lengths=[2] * n,
        sequences=sequences,
        masks=masks,
        stopped=[True] * rows,
        answers=[""] * rows,
        parsed=[None] * rows,
        rewards=torch.tensor(rewards, dtype=torch.float64),
        faults=[],
    )


def example() -> Rollouts:
    """Two groups of three answers; the second's rewards are all alike. Token 7 is the tool's."""
    return rollouts(
        rewards=[[1, 0, 0.5], [1, 1, 1]],
        sequences=[[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 7, 6, 4], [8, 9, 3], [8, 9, 4], [8, 9, 5]],
        masks=[[0, 0, 1, 1], [0, 0, 1], [0, 0, 1, 0, 1, 1], [0, 0, 1], [0, 0, 1], [0, 0, 1]],
    )


def sampled(r: Rollouts) -> list[tuple[int, int]]:
    """(row, position) of each token that the model sampled in the first group."""
    return [(row, at) for row in range(3) for at, m in enumerate(r.masks[row]) if m]


def log_probability(model: GPT, ids: list[int], at: int) -> Tensor:
    return model(torch.tensor([ids[:at]]))[0, -1].log_softmax(-1)[ids[at]]


def gradients(model: GPT) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# Advantages --------------------------------------------------------------------------------------


def test_an_advantage_is_the_reward_less_the_mean_of_the_group():
    assert advantages(torch.tensor([[1.0, 0, 0, 0], [2, 4, 4, 2]]), "mean").tolist() == [
        [0.75, -0.25, -0.25, -0.25],
        [-1, 1, 1, -1],
    ]


def test_leave_one_out_compares_with_the_mean_of_the_others():
    ours = advantages(torch.tensor([[1.0, 0, 0, 0], [2, 4, 4, 2]]), "leave_one_out")
    assert_close(ours, torch.tensor([[1, -1 / 3, -1 / 3, -1 / 3], [2 - 10 / 3, 4 - 8 / 3, 4 - 8 / 3, 2 - 10 / 3]]))


# Batches -----------------------------------------------------------------------------------------


def test_only_sampled_tokens_are_targets_and_carry_their_answers_advantage():
    (batch,) = batches(example(), "mean", 8, PAD, CPU)
    assert batch.inputs.tolist() == [[1, 2, 5, PAD, PAD], [1, 2, 3, 4, PAD], [1, 2, 3, 7, 6]]
    assert batch.targets.tolist() == [[-1, 5, -1, -1, -1], [-1, 3, 4, -1, -1], [-1, 3, -1, 6, 4]]
    assert batch.counts.tolist() == [[0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 0, 1, 1]]
    assert batch.advantages.tolist() == [[0, -0.5, 0, 0, 0], [0, 0.5, 0.5, 0, 0], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize(("size", "rows"), [(1, [1, 1, 1]), (2, [2, 1]), (3, [3]), (4, [3])])
def test_no_answer_is_lost_where_the_batch_size_does_not_divide_their_number(size, rows):
    assert [len(batch.inputs) for batch in batches(example(), "mean", size, PAD, CPU)] == rows


def test_groups_with_equal_rewards_are_left_out_though_their_mean_is_rounded():
    third = [0.1] * 3
    assert sum(third) / 3 != 0.1
    assert batches(rollouts([third], [[1, 2, 3]] * 3, [[0, 0, 1]] * 3), "mean", 8, PAD, CPU) == []


def test_a_group_with_a_reward_that_failed_is_left_out():
    r = rollouts([[1, math.nan, 0]], [[1, 2, 3]] * 3, [[0, 0, 1]] * 3)
    assert batches(r, "mean", 8, PAD, CPU) == []


# The loss ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 8])
def test_the_first_update_is_reinforce_averaged_over_the_tokens_of_the_step(size):
    r, ours, plain = example(), tiny_gpt(), tiny_gpt()
    values = [0.5, -0.5, 0.0]
    tokens = sampled(r)
    loss = -sum(log_probability(plain, r.sequences[row], at) * values[row] for row, at in tokens) / len(tokens)
    loss.backward()
    accumulate(PolicyLoss(ours, clip=0.2), batches(r, "mean", size, PAD, CPU))
    assert_close(gradients(ours), gradients(plain), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("shift", [0.05, 1.0])  # within the clip; mostly beyond it
def test_later_updates_clip_the_ratio_as_ppo_does(shift):
    r, ours, plain = example(), tiny_gpt(), tiny_gpt()
    tokens = sampled(r)
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        old = {
            (row, at): log_probability(plain, r.sequences[row], at) + shift * torch.randn((), generator=drawn)
            for row, at in tokens
        }
    values = [0.5, -0.5, 0.0]
    terms = []
    for row, at in tokens:
        ratio = (log_probability(plain, r.sequences[row], at) - old[row, at]).exp()
        clipped = min(max(ratio, torch.tensor(0.8)), torch.tensor(1.2))
        terms.append(-min(ratio * values[row], clipped * values[row]))
    expected = torch.stack(terms).mean()
    expected.backward()
    (batch,) = batches(r, "mean", 8, PAD, CPU)
    order = [1, 0, 2]  # rows by length
    before = torch.zeros(batch.targets.shape)
    for row, at in tokens:
        before[order.index(row), at - 1] = old[row, at]
    loss = accumulate(PolicyLoss(ours, clip=0.2), [batch._replace(old=before)])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert_close(gradients(ours), gradients(plain), atol=1e-6, rtol=1e-4)


def test_the_kl_term_is_half_the_squared_log_ratio_of_each_sampled_token():
    r, ours, plain, start = example(), tiny_gpt(0), tiny_gpt(0), tiny_gpt(1)
    tokens = sampled(r)
    expected = torch.zeros(())
    for row, at in tokens:
        logp, reference = (log_probability(m, r.sequences[row], at) for m in (plain, start))
        value = [0.5, -0.5, 0.0][row]
        expected = expected + (-value * (logp - logp.detach()).exp() + 0.3 * 0.5 * (logp - reference.detach()) ** 2)
    expected = expected / len(tokens)
    expected.backward()
    (batch,) = batches(r, "mean", 8, PAD, CPU)
    with torch.no_grad():
        reference = -start(batch.inputs, batch.targets, reduction="none").view_as(batch.targets)
    loss = accumulate(PolicyLoss(ours, clip=0.2, kl=0.3), [batch._replace(start=reference)])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert_close(gradients(ours), gradients(plain), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_equal_answers_to_a_prompt_are_computed_once_and_count_as_often_as_they_came(kl):
    long, short, other = [1, 2, 3, 4], [1, 2, 5], [8, 9, 5]
    sequences, rewards = [long, short, long, long, other, other, other, [8, 9, 4]], [[1, 0, 1, 1], [0, 1, 0, 1]]
    r = rollouts(rewards, sequences, [[0, 0] + [1] * (len(ids) - 2) for ids in sequences])
    ours, plain, start = tiny_gpt(0), tiny_gpt(0), tiny_gpt(1)
    micro = batches(r, "mean", 8, PAD, CPU)
    # of the second prompt's three equal answers one got another reward: that is another row
    assert [int(counts.max()) for batch in micro for counts in batch.counts] == [1, 2, 1, 1, 3]
    terms = []
    for row, ids in enumerate(sequences):
        advantage = rewards[row // 4][row % 4] - sum(rewards[row // 4]) / 4
        for at in range(2, len(ids)):
            logp, reference = (log_probability(m, ids, at) for m in (plain, start))
            ratio = (logp - logp.detach()).exp()
            terms.append(-ratio * advantage + kl * 0.5 * (logp - reference.detach()) ** 2)
    torch.stack(terms).mean().backward()
    with torch.no_grad():
        micro = [
            b._replace(start=-start(b.inputs, b.targets, reduction="none").view_as(b.targets)) if kl else b
            for b in micro
        ]
    accumulate(PolicyLoss(ours, 0.2, kl), micro, count=PolicyLoss.count)
    assert_close(gradients(ours), gradients(plain), atol=1e-6, rtol=1e-4)


def test_the_kl_terms_gradient_is_on_average_that_of_the_kl():
    torch.manual_seed(0)
    logits, start = torch.randn(5, requires_grad=True), torch.randn(5).log_softmax(0)
    policy = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((policy.exp() * (policy - start)).sum(), logits, retain_graph=True)
    average = torch.zeros(5)
    for token in range(5):
        (one,) = torch.autograd.grad(divergence(policy[token], start[token]), logits, retain_graph=True)
        average += policy[token].exp().detach() * one
    assert_close(average, exact)


def test_a_batch_without_sampled_tokens_adds_nothing():
    model = tiny_gpt()
    nothing = Batch(torch.ones(1, 3, dtype=torch.int64), torch.full((1, 3), -1), torch.zeros(1, 3), torch.zeros(1, 3))
    assert accumulate(PolicyLoss(model, 0.2), [nothing]).item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
