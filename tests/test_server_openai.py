"""The openai client, unchanged, against the server; a real engine behind it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from nanochat.engine import Engine
from tests.tiny_engine import TOKENIZER, naive_greedy, scripted_engine, special, tiny_gpt
from tests.tiny_server import END, START, RecordingEngine, serving

HELLO = [{"role": "user", "content": "hello"}]
CONTEXT = 64
MODEL = tiny_gpt(TOKENIZER.get_vocab_size(), CONTEXT)


def client_of(http: httpx.Client, **settings) -> openai.OpenAI:
    settings = {"api_key": "any", "max_retries": 0, **settings}
    return openai.OpenAI(base_url=f"{http.base_url}/v1", http_client=httpx.Client(trust_env=False), **settings)


@pytest.fixture(scope="module")
def server() -> Iterator[httpx.Client]:
    with serving(Engine(MODEL, TOKENIZER), model="d2", temperature=0.0, max_tokens=20) as http:
        yield http


@pytest.fixture(scope="module")
def client(server) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


def expected(messages: list[dict], max_tokens: int) -> str:
    ids = TOKENIZER.render_for_completion({"messages": [*messages, {"role": "assistant", "content": ""}]})
    hidden = {special(name.strip("<|>")) for name in TOKENIZER.get_special_tokens()}
    return TOKENIZER.decode([i for i in new_ids(ids, max_tokens) if i not in hidden])


def new_ids(ids: list[int], max_tokens: int) -> list[int]:
    """What the model writes, without its end."""
    return naive_greedy(MODEL, ids, max_tokens)[0][len(ids) :]


def test_the_model_list_names_the_checkpoint(client):
    (model,) = client.models.list().data
    assert (model.id, model.context, model.source) == ("d2", CONTEXT, "sft")
    assert client.models.retrieve("d2").id == "d2"


def test_an_answer_is_what_the_plain_model_writes(client):
    answer = client.chat.completions.create(model="d2", messages=HELLO, max_tokens=12)
    assert answer.choices[0].message.content == expected(HELLO, 12)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    prompt = len(TOKENIZER.render_for_completion({"messages": [*HELLO, {"role": "assistant", "content": ""}]}))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 12)
    assert answer.usage.total_tokens == prompt + 12


def test_a_stream_is_the_same_in_pieces_and_ends_with_its_usage(client):
    stream = client.chat.completions.create(
        model="d2", messages=HELLO, max_completion_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected(HELLO, 12)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12
    assert all(c.usage is None for c in chunks[:-1])


def test_streams_at_once_equal_those_alone(client):
    questions = [[{"role": "user", "content": text}] for text in ("a", "b cat", "hello world", "12+3", "on the mat")]

    def answer(messages: list[dict]) -> str:
        stream = client.chat.completions.create(model="d2", messages=messages, max_tokens=20, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(answer, questions * 4))
    assert answers == [expected(messages, 20) for messages in questions] * 4


def test_n_answers_differ_and_repeat_with_the_seed(client):
    def answers(**settings) -> list[str]:
        made = client.chat.completions.create(
            model="d2", messages=HELLO, n=4, seed=1, temperature=1.5, max_tokens=10, **settings
        )
        return [choice.message.content for choice in made.choices]

    first = answers()
    assert len(set(first)) > 1
    assert answers() == first
    stream = client.chat.completions.create(
        model="d2", messages=HELLO, n=4, seed=1, temperature=1.5, max_tokens=10, stream=True
    )
    streamed = [""] * 4
    for chunk in stream:
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == first


def test_a_stop_string_ends_the_answer_before_it(client):
    whole = expected(HELLO, 20)
    stop = whole[5:8]
    answer = client.chat.completions.create(model="d2", messages=HELLO, stop=["never there", stop])
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(model="d2", messages=HELLO, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole[: whole.index(stop)]


def test_logprobs_are_those_of_the_models_tokens(client):
    made = client.chat.completions.create(model="d2", messages=HELLO, max_tokens=6, logprobs=True, top_logprobs=2)
    content = made.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in content).decode("utf-8", "replace") == expected(HELLO, 6)
    for token in content:
        assert len(token.top_logprobs) == 2
        assert token.logprob == token.top_logprobs[0].logprob <= 0  # greedy: the likeliest is the one
    stream = client.chat.completions.create(
        model="d2", messages=HELLO, max_tokens=6, logprobs=True, top_logprobs=2, stream=True
    )
    streamed = [t for chunk in stream if chunk.choices[0].logprobs for t in chunk.choices[0].logprobs.content]
    assert [token.bytes for token in streamed] == [token.bytes for token in content]


def test_logprobs_end_where_a_stop_string_cuts(client):
    whole = expected(HELLO, 20)
    made = client.chat.completions.create(model="d2", messages=HELLO, stop=whole[5:8], logprobs=True)
    text = b"".join(bytes(t.bytes) for t in made.choices[0].logprobs.content).decode("utf-8", "replace")
    assert text.startswith(made.choices[0].message.content)
    assert whole[5:8] not in text


def test_a_completion_continues_raw_text(client):
    ids = [TOKENIZER.get_bos_token_id(), *TOKENIZER.encode("the cat")]
    written = new_ids(ids, 8)
    made = client.completions.create(model="d2", prompt="the cat", max_tokens=8, logprobs=1)
    assert made.choices[0].text == TOKENIZER.decode(written)
    logprobs = made.choices[0].logprobs
    assert "".join(logprobs.tokens) == made.choices[0].text
    assert logprobs.text_offset == [sum(map(len, logprobs.tokens[:i])) for i in range(8)]
    assert client.completions.create(model="d2", prompt=ids, max_tokens=8).choices[0].text == made.choices[0].text
    stream = client.completions.create(model="d2", prompt="the cat", max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == made.choices[0].text


def test_completions_of_many_prompts_come_in_their_order(client):
    both = client.completions.create(model="d2", prompt=["the cat", "12+"], n=2, max_tokens=4)
    alone = [client.completions.create(model="d2", prompt=p, max_tokens=4) for p in ("the cat", "12+")]
    texts = [one.choices[0].text for one in alone]
    assert [choice.text for choice in both.choices] == [texts[0], texts[0], texts[1], texts[1]]
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone)


def test_a_second_turn_finds_the_first_in_the_cache(client):
    messages = [{"role": "user", "content": "the cat sat on the mat, how are you?"}]
    client.chat.completions.create(model="d2", messages=messages, max_tokens=4)
    again = client.chat.completions.create(model="d2", messages=messages, max_tokens=4)
    assert again.usage.prompt_tokens_details.cached_tokens > 0


def test_tool_calls_come_apart_from_the_text():
    ids = [START, *b"x", special("python_start"), *b"1+2", special("python_end")]
    engine = scripted_engine(TOKENIZER, *ids, sequence_len=CONTEXT)
    # the tool writes output_start, "3", output_end; after output_end the script goes on
    engine.model.table[special("output_end"), ord("y")] = engine.model.table[ord("y"), END] = 1000.0
    with serving(engine, temperature=0.0) as http, client_of(http) as client:
        message = client.chat.completions.create(model="", messages=HELLO).choices[0].message
        chunks = list(client.chat.completions.create(model="", messages=HELLO, stream=True))
        plain = http.post("/chat/completions", json={"messages": HELLO}).text
    parts = [
        {"type": "text", "text": "x"},
        {"type": "python", "text": "1+2"},
        {"type": "python_output", "text": "3"},
        {"type": "text", "text": "y"},
    ]
    assert message.content == "xy"
    assert message.parts == parts
    joined: list[dict] = []
    for delta in (chunk.choices[0].delta for chunk in chunks):
        pieces = getattr(delta, "parts", None) or ([{"type": "text", "text": delta.content}] if delta.content else [])
        for piece in pieces:
            if joined and joined[-1]["type"] == piece["type"]:
                joined[-1]["text"] += piece["text"]
            else:
                joined.append(dict(piece))
    assert joined == parts
    tokens = [json.loads(block[6:]).get("token", "") for block in plain.split("\n\n") if block]
    call = "<|python_start|>1+2<|python_end|><|output_start|>3<|output_end|>"
    assert "".join(tokens) == f"x{call}y"


def test_an_answer_that_is_sent_back_is_the_tool_call_it_was():
    engine = RecordingEngine()
    engine.gate.set()
    call = [{"type": "python", "text": "1+2"}, {"type": "python_output", "text": "3"}]
    ends = [{"role": "user", "content": [{"type": "text", "text": "b"}]}]
    with serving(engine, max_tokens=1) as http:
        for message in ({"content": call}, {"content": "", "parts": call}):
            messages = [*HELLO, {"role": "assistant", **message}, *ends]
            assert http.post("/v1/chat/completions", json={"messages": messages}).status_code == 200
            assert "<|python_start|>1+2<|python_end|><|output_start|>3<|output_end|>" in engine.prompts[-1]
            assert special("python_start") in engine.ids


def test_a_full_context_drops_whole_turns_and_says_so(client):
    turns = [{"role": "user", "content": "x" * 30}, {"role": "assistant", "content": "y" * 10}, *HELLO]
    raw = client.chat.completions.with_raw_response.create(model="d2", messages=turns)
    assert raw.headers["x-dropped-messages"] == "2"
    assert raw.parse().dropped_messages == 2
    assert raw.parse().choices[0].message.content == expected(HELLO, 20)
    stream = client.chat.completions.create(model="d2", messages=turns, stream=True)
    assert next(iter(stream)).dropped_messages == 2


def test_by_flag_a_full_context_is_refused():
    turns = [{"role": "user", "content": "x" * 30}, {"role": "assistant", "content": "y" * 10}, *HELLO]
    with serving(Engine(MODEL, TOKENIZER), drops_turns=False) as http, client_of(http) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="", messages=turns)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    "settings",
    [
        *({"temperature": x} for x in (0, 5e-324, 1e-5, 1e-4, 2)),
        *({"top_p": x} for x in (5e-324, 1e-9, 1)),
        *({"min_p": x} for x in (5e-324, 1)),
        *({"repetition_penalty": x} for x in (0.1, 10)),
        *({"top_k": x} for x in (0, 1, 2**31 - 1)),
        *({"seed": x} for x in (-(2**63), 2**63 - 1)),
    ],
)
def test_the_ends_of_all_ranges_are_taken(client, settings):
    settings = {"temperature": 1.0, **settings}
    extra = {name: settings.pop(name) for name in list(settings) if name in ("top_k", "min_p", "repetition_penalty")}
    made = client.completions.create(model="d2", prompt="12+", max_tokens=4, extra_body=extra, **settings)
    assert 1 <= made.usage.completion_tokens <= 4


@pytest.mark.parametrize(
    ("settings", "error", "code"),
    [
        ({"temperature": -1}, openai.BadRequestError, "invalid_greater_than_equal"),
        ({"n": 1000}, openai.BadRequestError, "invalid_less_than_equal"),
        ({"messages": []}, openai.BadRequestError, "invalid_too_short"),
        ({"messages": [{"role": "user", "content": "x" * 500}]}, openai.BadRequestError, "context_length_exceeded"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, openai.BadRequestError, "invalid_literal_error"),
        ({"model": "gpt-9"}, openai.NotFoundError, "model_not_found"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "unsupported_parameter"),
    ],
)
def test_the_client_understands_the_errors(client, settings, error, code):
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{"model": "d2", "messages": HELLO, **settings})
    assert caught.value.code == code
    assert caught.value.type == "invalid_request_error"
    assert caught.value.param


def test_after_an_error_the_engine_answers_as_before(monkeypatch):
    engine = Engine(MODEL, TOKENIZER)
    with serving(engine, temperature=0.0) as http, client_of(http) as client:
        client.chat.completions.create(model="", messages=HELLO, max_tokens=5)
        with monkeypatch.context() as patch:
            patch.setattr(engine, "_write_next", lambda *args: [][0])
            with pytest.raises(openai.InternalServerError):
                client.chat.completions.create(model="", messages=HELLO, n=3)
        made = client.chat.completions.create(model="", messages=HELLO, max_tokens=12)
        assert made.choices[0].message.content == expected(HELLO, 12)
        assert http.get("/stats").json()["engines"][0]["running"] == 0


def test_without_the_key_nothing_is_answered_but_the_page_and_health():
    with serving(RecordingEngine(), api_key="secret", max_tokens=1) as http:
        with client_of(http, api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(model="", messages=HELLO)
        with client_of(http, api_key="secret") as client:
            assert client.models.list().data
        for path in ("/v1/models", "/stats", "/metrics", "/nothing"):
            refused = http.get(path)
            assert refused.status_code == 401
            assert refused.json()["error"]["type"] == "authentication_error"
            assert refused.headers["www-authenticate"] == "Bearer"
        assert http.post("/chat/completions", json={"messages": HELLO}).status_code == 401
        for path in ("/", "/health", "/logo.svg", "/openapi.json"):
            assert http.get(path).status_code == 200
