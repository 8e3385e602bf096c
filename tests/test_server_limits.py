"""What clients can do to a server: wrong, huge and half requests, full queues, slow readers, engines that fail."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from nanochat.server import gate
from tests.tiny_server import CHAT, HELLO, RecordingEngine, ask, serving, stats, until


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    engine = RecordingEngine()
    engine.gate.set()
    with serving(engine, max_tokens=2, max_body_bytes=10_000) as client:
        yield client


def connect(client: httpx.Client) -> socket.socket:
    return socket.create_connection(("127.0.0.1", client.base_url.port), timeout=10)


def head(length: int) -> bytes:
    fields = [f"POST {CHAT} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join([*fields, "", ""]).encode()


def error_of(response: httpx.Response) -> dict:
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"] and "\n" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "python", "text": "x"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [*HELLO["messages"], {"role": "system", "content": "x"}]}, "messages.1.role"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"seed": 10**30}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
    ],
)
def test_a_wrong_value_is_400_and_names_its_field(client, fields, param):
    response = ask(client, **fields)
    assert response.status_code == 400
    assert error_of(response)["param"] == param
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"hello"',
        b"\xff\xfe",
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}",
        b"[" * 9000,
    ],
)
def test_what_is_no_request_is_400(client, body):
    for path in (CHAT, "/v1/completions"):
        response = client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 400
        error_of(response)
    old = client.post("/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert old.status_code in (400, 422)
    assert "detail" in old.json()
    assert ask(client).status_code == 200


def test_unknown_paths_and_methods_have_the_error_object(client):
    assert error_of(client.get("/v2"))["code"] == "not_found"
    response = client.get(CHAT)
    assert response.status_code == 405 and response.headers["allow"] == "POST"
    assert error_of(response)["code"] == "method_not_allowed"
    form = client.post(CHAT, data={"messages": "x"})
    assert form.status_code == 400
    error_of(form)


def test_a_prompt_that_leaves_no_room_is_refused(client):
    for n in (120, 128, 500):
        response = ask(client, messages=[{"role": "user", "content": "@" * n}])
        assert response.status_code == (200 if n < 124 else 400)  # bos, user_start, user_end, assistant_start
    assert error_of(response)["code"] == "context_length_exceeded"
    response = client.post("/v1/completions", json={"prompt": "@" * 127})
    assert (response.status_code, error_of(response)["code"]) == (400, "context_length_exceeded")
    assert client.post("/v1/completions", json={"prompt": "@" * 126}).json()["usage"]["completion_tokens"] == 1
    assert client.post("/v1/completions", json={"prompt": ""}).status_code == 200
    for prompt in ([], [[]], [10**6], [-1]):
        assert client.post("/v1/completions", json={"prompt": prompt}).status_code == 400


def test_a_large_body_is_413_whatever_its_header_says(client):
    big = json.dumps({**HELLO, "user": "x" * 10_000}).encode()
    said = client.post(CHAT, content=big, headers={"Content-Type": "application/json"})
    chunked = client.post(CHAT, content=iter([big[:100], big[100:]]), headers={"Content-Type": "application/json"})
    for response in (said, chunked):
        assert response.status_code == 413
        assert error_of(response)["code"] == "request_too_large"
    assert ask(client, user="x" * 9_000).status_code == 200


def test_half_a_request_harms_nobody(client, monkeypatch):
    body = json.dumps(HELLO).encode()
    with connect(client) as leaver:
        leaver.sendall(head(len(body)) + body[:10])
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.2)
    with connect(client) as sleeper:
        sleeper.sendall(head(len(body)) + body[:10])
        assert ask(client).status_code == 200
        assert sleeper.recv(10_000).startswith(b"HTTP/1.1 408")
    with connect(client) as babbler:
        babbler.sendall(b"\x00\xff nonsense\r\n\r\n")
        assert babbler.recv(10_000).startswith(b"HTTP/1.1 400")
    assert stats(client)["open_requests"] == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot_at_once(stream):
    engine = RecordingEngine(sequence_len=100_000)
    engine.gate.set()
    body = json.dumps({**HELLO, "stream": stream, "max_tokens": 90_000}).encode()
    with serving(engine) as client:
        with connect(client) as leaver:
            leaver.sendall(head(len(body)) + body)
            until(lambda: engine.written > 5)
            if stream:
                assert leaver.recv(10)
        assert engine.cancelled.wait(5)
        written = engine.written
        assert ask(client, max_tokens=3).status_code == 200
        assert engine.written == written + 3
        assert stats(client)["running"] == stats(client)["open_requests"] == 0


def test_a_client_that_leaves_the_queue_is_never_served():
    engine = RecordingEngine()
    body = json.dumps(HELLO).encode()
    with serving(engine, max_tokens=3) as client:
        with connect(client) as first, connect(client) as second, connect(client) as third:
            for n, one in enumerate((first, second, third)):  # one writes, one waits in the engine, one in the queue
                one.sendall(head(len(body)) + body)
                until(lambda n=n: stats(client)["open_requests"] == n + 1)
            assert stats(client)["waiting"] == 1
            third.close()
            until(lambda: stats(client)["waiting"] == 0)
            engine.gate.set()
            assert first.recv(10) and second.recv(10)
        assert len(engine.prompts) == 2


def test_a_full_queue_is_429_and_says_when_to_come_back():
    engine = RecordingEngine()
    codes: list[int] = []
    with serving(engine, max_tokens=2, max_queue=2) as client:
        threads = [threading.Thread(target=lambda: codes.append(ask(client).status_code)) for _ in range(4)]
        for n, thread in enumerate(threads):
            thread.start()
            until(lambda n=n: stats(client)["open_requests"] == n + 1)
        refused = ask(client)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert error_of(refused)["type"] == "rate_limit_error"
        engine.gate.set()
        for thread in threads:
            thread.join(10)
        assert ask(client).status_code == 200
    assert codes == [200] * 4


def test_clients_take_turns():
    """Six requests of one client and then two of another: the other waits for one of the first's, not for all."""
    engine = RecordingEngine()
    with serving(engine, max_tokens=1) as client:
        threads = []

        def send(host: str, text: str, n: int) -> None:
            transport = httpx.HTTPTransport(local_address=host)
            with httpx.Client(base_url=client.base_url, transport=transport, timeout=20) as other:
                ask(other, messages=[{"role": "user", "content": text}])

        for n, (host, text) in enumerate([("127.0.0.2", "a")] * 6 + [("127.0.0.3", "b")] * 2):
            threads.append(threading.Thread(target=send, args=(host, text, n)))
            threads[-1].start()
            until(lambda n=n: stats(client)["open_requests"] == n + 1)
        engine.gate.set()
        for thread in threads:
            thread.join(10)
    order = "".join("ab"["user_start|>b" in prompt] for prompt in engine.prompts)
    assert order == "aaababaa"  # two were with the engine before the other came


def test_replicas_share_the_work():
    engines = [RecordingEngine(slots=2), RecordingEngine(slots=2)]
    with serving(*engines, max_tokens=2) as client:
        threads = [threading.Thread(target=ask, args=(client,)) for _ in range(4)]
        for n, thread in enumerate(threads):
            thread.start()
            until(lambda n=n: stats(client)["open_requests"] == n + 1)
        assert stats(client)["available_workers"] == 0
        for engine in engines:
            engine.gate.set()
        for thread in threads:
            thread.join(10)
        plain = client.post("/chat/completions", json=HELLO).text
        assert '"gpu": 0' in plain
    assert [len(engine.prompts) for engine in engines] == [3, 2]


@pytest.mark.parametrize("stream", [True, False])
def test_an_engine_that_fails_answers_500_and_goes_on(stream, caplog):
    engine = RecordingEngine(slots=2)
    engine.gate.set()
    engine.fails = True
    with serving(engine, max_tokens=3) as client:
        failed = ask(client, stream=stream, n=2)
        assert ask(client).status_code == 200
        assert stats(client)["running"] == 0
    assert failed.status_code == 500
    assert error_of(failed)["code"] == "engine_error"
    assert "out of memory" in caplog.text and "out of memory" not in failed.text


def test_an_engine_that_fails_in_the_middle_of_a_stream_says_so_in_it():
    engine = RecordingEngine(sequence_len=100_000)
    engine.gate.set()
    with serving(engine, max_tokens=4000) as client:
        with client.stream("POST", CHAT, json={**HELLO, "stream": True}) as response:
            lines = response.iter_lines()
            assert "assistant" in next(lines)
            engine.fails = True
            events = [json.loads(line[6:]) for line in lines if line]
        assert events[-1]["error"]["code"] == "engine_error"
        assert ask(client, max_tokens=2).status_code == 200


def test_a_reader_that_does_not_read_holds_nobody_up():
    engine = RecordingEngine(sequence_len=100_000, slots=4)
    engine.gate.set()
    body = json.dumps({**HELLO, "stream": True, "n": 4, "max_tokens": 500}).encode()
    with serving(engine) as client, connect(client) as sleeper:
        sleeper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sleeper.sendall(head(len(body)) + body)
        until(lambda: engine.written > 10)
        assert ask(client, max_tokens=2).status_code == 200
        until(lambda: stats(client)["running"] == 0)  # its slots are free although nothing was read


def test_a_reader_that_does_not_read_is_given_up(monkeypatch, caplog):
    monkeypatch.setattr("nanochat.server.streaming.SEND_SECONDS", 0.2)
    monkeypatch.setattr("nanochat.server.engine_loop.PAUSE_SECONDS", 0.0)
    engine = RecordingEngine(sequence_len=1_000_000, slots=64)
    engine.gate.set()
    body = json.dumps({**HELLO, "stream": True, "n": 64, "max_tokens": 100_000}).encode()
    with caplog.at_level("INFO", "nanochat.server"), serving(engine) as client, connect(client) as sleeper:
        sleeper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sleeper.sendall(head(len(body)) + body)
        until(lambda: "the client does not read" in caplog.text)
        until(lambda: stats(client)["open_requests"] == 0)
        assert ask(client, max_tokens=2).status_code == 200


def test_metrics_count_requests_and_tokens(client):
    def figures() -> dict[tuple, float]:
        families = text_string_to_metric_families(client.get("/metrics").text)
        return {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}

    before = figures()
    assert ask(client).status_code == 200
    assert ask(client, n=0).status_code == 400
    client.get("/wp-admin.php")
    after = figures()
    grown = {key: value - before.get(key, 0) for key, value in after.items() if value != before.get(key, 0)}
    assert grown[("nanochat_requests_total", *sorted([CHAT, "POST", "200"]))] == 1
    assert grown[("nanochat_requests_total", *sorted([CHAT, "POST", "400"]))] == 1
    assert grown[("nanochat_requests_total", *sorted(["other", "GET", "404"]))] == 1
    assert grown[("nanochat_generated_tokens_total",)] == 2
    assert grown[("nanochat_time_to_first_token_seconds_count",)] == 1
    assert after[("nanochat_running",)] == 0


@pytest.mark.parametrize("log_text", [False, True])
def test_the_log_has_message_text_only_if_asked(log_text, caplog):
    engine = RecordingEngine()
    engine.gate.set()
    caplog.set_level(logging.INFO)
    with serving(engine, max_tokens=3, log_text=log_text) as client:
        ask(client, messages=[{"role": "user", "content": "my secret"}])
        ask(client, messages=[{"role": "user", "content": "my secret"}], n=0)
    assert "answer 3 tokens" in caplog.text
    assert ("my secret" in caplog.text) is log_text
    assert ("aaa" in caplog.text) is log_text
