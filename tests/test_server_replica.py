"""Engines that die, and others that are started in their place."""

from __future__ import annotations

import threading
from itertools import count
from multiprocessing import Pipe

from tests.tiny_server import EngineThread, RecordingEngine, ask, serving, stats, until


def test_an_engine_that_dies_is_started_again_and_what_waits_is_answered(caplog, monkeypatch):
    monkeypatch.setattr("nanochat.server.replica.RESTART_SECONDS", 0.2)
    engine, answers = RecordingEngine(), []
    engine.dies = True
    with serving(engine, max_tokens=2) as client:
        threads = []
        for n in range(4):  # two are with the engine, two in the queue
            threads.append(threading.Thread(target=lambda: answers.append(ask(client))))
            threads[-1].start()
            until(lambda n=n: stats(client)["open_requests"] == n + 1)
        engine.gate.set()
        until(lambda: client.get("/health").json()["status"] == "no engine")
        assert client.get("/health").status_code == 503 and stats(client)["available_workers"] == 0
        for thread in threads:
            thread.join(10)
        assert client.get("/health").json()["ready"]
    assert sorted(answer.status_code for answer in answers) == [200, 200, 500, 500]
    assert "its engine died with 2 answers; another starts" in caplog.text


def test_when_no_engine_can_be_started_again_nobody_waits_for_one(caplog, monkeypatch):
    monkeypatch.setattr("nanochat.server.replica.RESTART_SECONDS", 0.2)
    engine, starts = RecordingEngine(), count()
    engine.dies = True
    start = EngineThread.__init__

    def start_badly(self: EngineThread, engine: RecordingEngine) -> None:
        nth = next(starts)
        if nth == 0:
            raise OSError(12, "Cannot allocate memory")
        if nth > 1:
            return start(self, engine)
        self.connection, theirs = Pipe()
        theirs.send("the checkpoint is damaged")
        theirs.close()
        self.thread = threading.Thread()
        self.thread.start()

    with serving(engine, max_tokens=2) as client:
        monkeypatch.setattr(EngineThread, "__init__", start_badly)
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(ask(client))) for _ in range(3)]
        for n, thread in enumerate(threads):  # two are with the engine, one in the queue
            thread.start()
            until(lambda n=n: stats(client)["open_requests"] == n + 1)
        engine.gate.set()
        for thread in threads:
            thread.join(10)
        assert sorted(answer.status_code for answer in answers) == [500, 500, 503]
        until(lambda: client.get("/health").status_code == 200)
        assert ask(client).status_code == 200
    assert "Cannot allocate memory" in caplog.text and "the checkpoint is damaged" in caplog.text


def test_while_one_engine_is_dead_the_others_answer(monkeypatch):
    monkeypatch.setattr("nanochat.server.replica.RESTART_SECONDS", 60.0)
    engines = [RecordingEngine(), RecordingEngine()]
    engines[0].dies = True
    for engine in engines:
        engine.gate.set()
    with serving(*engines, max_tokens=2) as client:
        assert ask(client).status_code == 500
        assert [ask(client).status_code for _ in range(5)] == [200] * 5
        assert client.get("/health").status_code == 200
