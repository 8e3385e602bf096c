"""What the report says of a chat task after its accuracy: how sure it is, the controls, and what went wrong."""

from __future__ import annotations

from typing import Any

from nanochat.evals.chat import ChatResult
from nanochat.evals.stats import Paired, wilson

LONGEST_NAMED = 20  # characters of an answer that a line of text can name


def random_guess(result: ChatResult, baseline: float) -> float:
    """Accuracy of a random letter; of guessing (`baseline`) where the problems have no letters."""
    return baseline if result.random is None else result.random


def always_the_commonest(result: ChatResult) -> str:
    """The majority control in words."""
    if result.commonest and len(result.commonest) <= LONGEST_NAMED:
        return f"always answering {result.commonest}"
    return "always giving the commonest answer"


def better_than_guessing(result: ChatResult, baseline: float) -> str:
    """ "yes" where all of the 95% interval lies above both controls; else "no", and what does as well."""
    random, majority = random_guess(result, baseline), result.majority or 0.0
    if result.interval[0] > max(random, majority):
        return "yes"
    guess = f"{always_the_commonest(result)} ({majority:.4f})" if majority >= random else f"guessing ({random:.4f})"
    return f"no: {'no' if result.accuracy <= max(random, majority) else 'not shown to be'} better than {guess}"


def score_line(result: ChatResult, baseline: float) -> str:
    """What stands beside an accuracy on the screen."""
    low, high = result.interval
    _, _, why_not = better_than_guessing(result, baseline).partition(": ")
    return (
        f"95% interval {100 * low:.2f}% to {100 * high:.2f}%, {always_the_commonest(result)} "
        f"{100 * (result.majority or 0):.2f}%, random {100 * random_guess(result, baseline):.2f}%: "
        f"{why_not or 'better than guessing'}"
    )


def details(result: ChatResult, baseline: float) -> dict[str, Any]:
    """What stands behind one accuracy: its interval, the controls, kinder rules, and what went wrong.

    Args:
        baseline: accuracy of guessing, where the problems do not tell.
    """
    low, high = result.interval
    new: dict[str, Any] = {
        "95% interval": f"{low:.4f} to {high:.4f} ({result.num_passed} of {result.total})",
        "better than guessing": better_than_guessing(result, baseline),
        "random guess": random_guess(result, baseline),
        f"always the commonest {'answer' if result.random is None else 'letter'}": result.majority or 0.0,
    }
    if result.chosen:
        new["letters chosen"] = ", ".join(f"{letter} {n}" for letter, n in result.chosen.items())
        if len(result.chosen) == 1 and result.total > 1:
            new["letters chosen"] += " (always the same)"
    if result.num_lenient is not None:
        new["same number, other spelling too"] = result.num_lenient / result.total
    if result.num_samples > 1:
        for k in powers_of_2(result.num_samples):
            value, error = result.pass_at(k)
            new[f"pass@{k}"] = f"{value:.4f} +- {error:.4f} (of {result.num_samples} samples)"
    if result.subjects:
        shares = [passed / n for passed, n in result.subjects.values()]
        new[f"mean over {len(shares)} subjects"] = sum(shares) / len(shares)
    for subject, (passed, n) in result.subjects.items():
        low, high = wilson(passed, n)
        new[f"subject {subject}"] = f"{passed / n:.4f} ({passed} of {n}, {low:.4f} to {high:.4f})"
    if result.num_cropped:
        new["prompts cropped to the context"] = result.num_cropped
    num_answers = result.total * result.num_samples
    faults = {
        "answers that the grader failed on": result.num_grader_errors,
        "empty answers": result.num_empty,
        "answers cut at the length limit": result.num_limited,
        "answers beyond the context": result.num_beyond,
    }
    new |= {f"{what} (of {num_answers})": n for what, n in faults.items() if n}
    if result.first_error:
        new["first error"] = result.first_error
    return new


def powers_of_2(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself."""
    return [*(k for i in range(most.bit_length()) if (k := 1 << i) < most), most]


def paired_line(paired: Paired, against: str) -> str:
    """What changed since the other stage, on the problems that both were asked."""
    now, then, n = paired.both + paired.only_second, paired.both + paired.only_first, paired.total
    low, high = paired.interval
    return (
        f"{then} -> {now} of {n}; {paired.only_second} only now, {paired.only_first} only in {against}; "
        f"difference {low:+.4f} to {high:+.4f}; {paired.verdict}"
    )
