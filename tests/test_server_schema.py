"""schemathesis throws at the server what the OpenAPI document allows, and what it does not: every answer is as the
document says, and none is a 5xx."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import checks

from nanochat.engine import Engine
from nanochat.server import schemas
from tests.tiny_engine import TOKENIZER, tiny_gpt
from tests.tiny_server import serving

# What a schema cannot say: roles that take turns, a prompt that fits the context, a model that is there.
NOT_SAID = [checks.positive_data_acceptance]
OPERATIONS = [
    ("GET", "/health"),
    ("GET", "/stats"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/chat/completions"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[httpx.Client]:
    engine = Engine(tiny_gpt(TOKENIZER.get_vocab_size()), TOKENIZER)
    with serving(engine, model="d2", max_tokens=4, api_key="k") as http:
        http.headers["Authorization"] = "Bearer k"
        yield http


@pytest.fixture(scope="module")
def schema(server) -> schemathesis.schemas.BaseSchema:
    return schemathesis.openapi.from_url(f"{server.base_url}/openapi.json")


def throw(schema: schemathesis.schemas.BaseSchema, method: str, path: str, examples: int) -> None:
    modes = [schemathesis.GenerationMode.POSITIVE]
    if method == "POST":
        modes.append(schemathesis.GenerationMode.NEGATIVE)
    for mode in modes:

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=schema[path][method].as_strategy(generation_mode=mode))
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(headers={"Authorization": "Bearer k"}, excluded_checks=NOT_SAID)

        check()


def test_the_document_has_all_operations(schema):
    assert {(m.upper(), p) for p, methods in schema.raw_schema["paths"].items() for m in methods} == set(OPERATIONS)


@pytest.mark.parametrize("n", [1, 3])
def test_an_answer_is_as_the_document_says(server, n):
    body = {"max_tokens": 3, "n": n, "model": "d2"}
    hello = {"messages": [{"role": "user", "content": "hello"}], "logprobs": True, "top_logprobs": 2}
    chat = server.post("/v1/chat/completions", json={**body, **hello})
    schemas.ChatCompletion.model_validate(chat.json(), strict=True, extra="forbid")
    text = server.post("/v1/completions", json={**body, "prompt": "hello", "logprobs": 2})
    schemas.Completion.model_validate(text.json(), strict=True, extra="forbid")


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_the_document_tells_the_truth(schema, method, path):
    throw(schema, method, path, examples=10 if method == "POST" else 3)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path"), [pair for pair in OPERATIONS if pair[0] == "POST"])
def test_the_document_tells_the_truth_at_length(schema, method, path):
    throw(schema, method, path, examples=200)
