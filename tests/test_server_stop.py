"""The server's end: what runs is finished or cancelled, new requests are told, and no thread is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import psutil
import pytest
import uvicorn

from nanochat.checkpoint import host_copy, write
from nanochat.environment import base_dir
from nanochat.server.app import Settings, create_app
from nanochat.server.stopping import StoppableServer
from scripts import chat_web
from tests.tiny_engine import TOKENIZER, tiny_gpt
from tests.tiny_server import CHAT, HELLO, RecordingEngine, client_of, replicas, running, until


def asking(client: httpx.Client, answers: list[httpx.Response], **fields) -> threading.Thread:
    def ask() -> None:
        answers.append(client.post(CHAT, json={**HELLO, **fields}))

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "engine"]


def test_finish_answers_what_was_accepted_and_refuses_what_is_new():
    engine, answers = RecordingEngine(), []
    with running([engine], "finish", 10, max_tokens=2) as server, client_of(server) as client:
        threads = [asking(client, answers) for _ in range(3)]
        until(lambda: client.get("/stats").json()["open_requests"] == 3)
        server.handle_exit(signal.SIGTERM, None)
        until(lambda: client.get("/health").status_code == 503)
        assert client.get("/health").json()["ready"] is False
        refused = client.post(CHAT, json=HELLO)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert client.post("/chat/completions", json=HELLO).status_code == 503
        assert not answers
        engine.gate.set()
        for thread in threads:
            thread.join(10)
        assert [answer.status_code for answer in answers] == [200] * 3
        until(lambda: not engine_threads())


def test_cancel_ends_what_runs_and_waits_with_an_error():
    engine, answers = RecordingEngine(sequence_len=100_000), []
    engine.gate.set()
    with running([engine], "cancel", 10, max_tokens=4000) as server, client_of(server) as client:
        threads = [asking(client, answers, stream=stream) for stream in (True, False, False, False)]
        until(lambda: client.get("/stats").json()["open_requests"] == 4 and engine.written > 5)
        server.handle_exit(signal.SIGINT, None)
        for thread in threads:
            thread.join(10)
        assert sorted(answer.status_code for answer in answers) in ([200, 503, 503, 503], [503] * 4)
        assert all("shutting_down" in answer.text for answer in answers)
        until(lambda: not engine_threads())
        assert engine.written < 2000


def test_what_is_not_finished_in_time_is_cancelled():
    engine, answers = RecordingEngine(sequence_len=100_000), []
    engine.gate.set()
    with running([engine], "finish", 0.2, max_tokens=4000) as server, client_of(server) as client:
        thread = asking(client, answers)
        until(lambda: engine.written > 5)
        server.handle_exit(signal.SIGTERM, None)
        thread.join(10)
        assert answers[0].status_code == 503
        until(lambda: not engine_threads())


def test_a_signal_while_the_server_starts_ends_it(monkeypatch):
    app = create_app(replicas(RecordingEngine()), TOKENIZER, Settings())
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", ws="none")
    server = StoppableServer(config, app.state.pool, "finish", 5)
    load = config.load
    monkeypatch.setattr(config, "load", lambda: (load(), signal.raise_signal(signal.SIGTERM)))
    server.run()
    assert server.told and not engine_threads()


def test_the_command_serves_a_checkpoint_and_ends_in_order():
    model = tiny_gpt(TOKENIZER.get_vocab_size())
    TOKENIZER.save(base_dir() / "tokenizer")
    meta = {"model_config": model.config.to_dict(), "tokenizer": TOKENIZER.fingerprint}
    write(base_dir() / "chatsft_checkpoints" / "d2", 7, host_copy(model.state_dict()), None, meta)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "scripts.chat_web", f"--port={port}", "--device_type=cpu"]
    env = {**os.environ, "NANOCHAT_API_KEY": "secret"}
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, env=env, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            assert process.stdout is not None
            assert f"http://127.0.0.1:{port}".encode() in process.stdout.readline()
            transport = httpx.HTTPTransport(retries=10)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=transport, timeout=20) as client:
                assert client.get("/v1/models").status_code == 401
                client.headers["Authorization"] = "Bearer secret"
                assert client.get("/v1/models").json()["data"][0]["id"] == "d2"
                answer = client.post(CHAT, json={**HELLO, "max_tokens": 5})
                assert answer.json()["usage"]["completion_tokens"] <= 5
                [engine] = psutil.Process(process.pid).children()
                engine.kill()
                until(lambda: client.get("/health").status_code == 503)
                until(lambda: client.get("/health").status_code == 200, seconds=60)
                [engine] = psutil.Process(process.pid).children()
                assert client.post(CHAT, json={**HELLO, "max_tokens": 5}).json()["choices"]
            process.send_signal(signal.SIGTERM)
            output = process.stdout.read().decode()
            assert process.wait(20) == 0, output
            assert not engine.is_running()
            assert "its engine died" in output and "Traceback" not in output and "hello" not in output
        finally:
            process.kill()


def test_a_port_that_is_taken_is_one_line_before_a_model_is_looked_for(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for flags, message in (
            ([f"--port={port}"], f"cannot listen at 127.0.0.1:{port}: Address already in use; choose another --port"),
            (["--port=0"], "--port must be from 1 to 65535, got 0"),
            (["--host=192.0.2.1"], "cannot listen at 192.0.2.1:8000: Cannot assign requested address; choose another"),
        ):
            with pytest.raises(SystemExit) as end:
                chat_web.main(flags)
            assert end.value.code == 2
            assert capsys.readouterr().err.startswith(f"error: {message}")
