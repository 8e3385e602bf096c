"""HumanEval: write a Python function from its docstring (Chen et al. 2021, arXiv 2107.03374).

Scoring runs what the model wrote, in nanochat/sandbox.py, and the tests in another process than that.
"""

from __future__ import annotations

import re
from typing import Any

from nanochat.sandbox import check_function
from tasks.common import Conversation, HubTask

FENCE = re.compile(r"```(?:python)?\s*\n(.*?)\n```", re.DOTALL)


def extract_imports(prompt: str) -> str:
    """The import lines before the first line that is neither an import, a comment nor blank."""
    imports = []
    for line in prompt.splitlines():
        line = line.strip()
        if line.startswith(("import ", "from ")):
            imports.append(line)
        elif line and not line.startswith("#"):
            break
    return "\n".join(imports)


def extract_program(completion: str) -> str:
    """The first fenced block of an answer, else all of it."""
    match = FENCE.search(completion)
    return (match.group(1) if match else completion).strip()


class HumanEval(HubTask):
    waits_to_judge = True

    def __init__(self, **slicing: Any) -> None:
        super().__init__("openai/openai_humaneval", "openai_humaneval", "test", **slicing)

    def get_example(self, index: int) -> Conversation:
        row = self.row(index)
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": f"{row['prompt']}\n{row['canonical_solution']}"},
        ]
        return {"messages": messages, "entry_point": row["entry_point"], "test": row["test"]}

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        """Whether the answer, with the prompt's imports, passes the data set's tests.

        Raises:
            SandboxError: the sandbox or the tests failed, so nothing is known about the answer.
        """
        prompt = conversation["messages"][0]["content"]
        program = f"{extract_imports(prompt)}\n\n{extract_program(response)}"
        return check_function(program, conversation["entry_point"], conversation["test"], prompt).success
