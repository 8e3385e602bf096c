"""A client of any OpenAI-compatible server: one question, one answer."""

from __future__ import annotations

import time
from typing import Any

from nanochat.config import InputError

TRIES = 5
FIRST_WAIT = 1.0  # seconds before the second try; each later one waits twice as long, or as long as the server says
LONGEST_WAIT = 60.0
TIMEOUT = 120.0
PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # statuses that may be others in a while


class Completions:
    """
    Args:
        endpoint: such as http://127.0.0.1:8000/v1; /chat/completions is appended.
        key: sent as the bearer token; None = none is sent.
    """

    def __init__(self, endpoint: str, model: str, key: str | None, temperature: float = 1.0) -> None:
        if not endpoint.startswith(("http://", "https://")):
            raise InputError(f"--endpoint {endpoint} is no address; it begins with http:// or https://")
        self.url = endpoint.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model, self.temperature = model, temperature
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def ask(self, prompt: str) -> str:
        """The answer to a prompt. A server that is busy or away is asked again.

        Raises:
            InputError: it refuses, or is away for long, or answers in another format.
        """
        import requests

        body = {"model": self.model, "temperature": self.temperature}
        body["messages"] = [{"role": "user", "content": prompt}]
        wait = FIRST_WAIT
        for number in range(TRIES):
            last = number == TRIES - 1
            try:
                response = requests.post(self.url, json=body, headers=self.headers, timeout=TIMEOUT)
            except requests.RequestException as error:
                if last:
                    raise InputError(f"{self.url} cannot be reached: {type(error).__name__}") from None
                time.sleep(wait)
            else:
                if response.ok:
                    return _content(response, self.url)
                if last or response.status_code not in PASSING:
                    reason = " ".join(response.text.split())[:200]
                    raise InputError(f"{self.url} refused with status {response.status_code}: {reason}")
                given = response.headers.get("Retry-After", "")
                time.sleep(min(float(given), LONGEST_WAIT) if given.isdigit() else wait)
            wait *= 2
        raise AssertionError


def _content(response: Any, url: str) -> str:
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise InputError(f"{url} answered in another format than chat completions: {response.text[:100]!r}") from None
    return content if isinstance(content, str) else ""
