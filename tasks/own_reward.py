"""Reinforcement learning on what you like: a reward function of your own, prompts of a task or a file.

    def reward(conversation, answer):  # in mine.py; then --reward=mine.py:reward
        return 1.0 if answer.strip() == conversation["messages"][-1]["content"] else 0.0

The conversation is the example with its last message, the reference answer; the model sees all before that. The answer
is text, with a tool call as `<|python_start|>12*3<|python_end|><|output_start|>36<|output_end|>`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanochat.config import InputError
from tasks.common import Conversation, Task
from tasks.customjson import CustomJSON
from tasks.registry import rl_tasks

Reward = Callable[[Conversation, str], float]


class Rewarded(Task):
    """A task's examples with another reward."""

    def __init__(self, task: Task, reward: Reward) -> None:
        super().__init__()
        self.task, self.own = task, reward

    def num_examples(self) -> int:
        return len(self.task)

    def get_example(self, index: int) -> Conversation:
        return self.task[index]

    def reward(self, conversation: Conversation, response: str) -> float:
        return self.own(conversation, response)

    def parsed(self, response: str) -> bool | None:
        return self.task.parsed(response)


def load_reward(spec: str) -> tuple[Reward, str]:
    """The function that `FILE.py:function` or `package.module:function` names, and a hash of its file.

    Raises:
        InputError: there is no such file, module or function, or it cannot be imported.
    """
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise InputError(f"--reward {spec} must be FILE.py:function or package.module:function")
    is_file = where.endswith(".py")
    if is_file and not Path(where).is_file():
        raise InputError(f"--reward {spec}: there is no file {where}")
    try:
        if is_file:
            found = importlib.util.spec_from_file_location(Path(where).stem, where)
            assert found is not None and found.loader is not None
            module = importlib.util.module_from_spec(found)
            found.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
    except Exception as error:  # whatever a user's file does
        raise InputError(f"--reward {spec}: importing {where} failed: {type(error).__name__}: {error}") from None
    function: Any = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"--reward {spec}: {where} has no function {name}")
    file = getattr(module, "__file__", None)
    source = Path(file).read_bytes() if file else b""
    return function, hashlib.sha256(source + spec.encode()).hexdigest()


def choose_tasks(task: str, conversations: str | None, reward: str | None) -> tuple[Task, Task, str]:
    """(training task, held-out task, hash of the reward function or "") of the flags of chat_rl."""
    train, val = rl_tasks(task) if conversations is None else CustomJSON.split(conversations)
    if reward is None:
        return train, val, ""
    function, digest = load_reward(reward)
    return Rewarded(train, function), Rewarded(val, function), digest
