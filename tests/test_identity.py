"""Conversations that give a model a name: from templates, and from a server of the test's own."""

from __future__ import annotations

import json
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nanochat import completions
from nanochat.chat import check_conversation
from nanochat.config import InputError
from scripts import make_identity
from tasks import identity
from tasks import reworded as rewording
from tasks.customjson import CustomJSON
from tasks.identity import About, conversations
from tasks.mixtures import says_who_it_is
from tasks.reworded import Reworded, Wordings, borrowed, reword

PAGE = """\
name: Ada
maker: the pupils of Riverside School
personality: cheerful and shy.
facts:
  - I like riddles.
  - Where do you live?: In the computer room.
"""
TALK = '{"messages": [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "I am Ada."}]}'


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "ada.yaml"
    path.write_text(PAGE)
    return path


def test_a_page_is_read(page: Path):
    about = About.read(page)
    assert about == About(
        "Ada",
        "the pupils of Riverside School",
        "cheerful and shy",
        ("I like riddles.",),
        (("Where do you live?", "In the computer room."),),
    )
    assert all(text in about.text() for text in ("Ada", "Riverside", "riddles", "computer room"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("maker: me", "it has no line `name: ...`"),
        ("name: 5", "it has no line `name: ...`"),
        ("- name", "it has no line `name: ...`"),
        ("name: Ada\nage: 5", "unknown key age; there are name, maker, personality, facts"),
        ("name: Ada\nfacts: many", "facts must be a list"),
        ("name: Ada\nfacts: [5]", "the fact 5 is neither"),
        ("name: [", "no YAML"),
    ],
)
def test_a_page_that_is_none_is_refused_in_one_line(tmp_path: Path, text: str, reason: str):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=reason) as error:
        About.read(path)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="no description"):
        About.read(tmp_path / "none.yaml")


def test_templates_speak_of_everything_on_the_page_and_no_two_are_the_same(page: Path):
    made = conversations(About.read(page), 500, seed=1)
    assert made == conversations(About.read(page), 500, seed=1) != conversations(About.read(page), 500, seed=2)
    for messages in made:
        check_conversation({"messages": messages})
    assert len({json.dumps(messages) for messages in made}) == 500
    answers = Counter(m["content"] for messages in made for m in messages if m["role"] == "assistant")
    for said in ("I am Ada.", "I was made by the pupils of Riverside School.", "I am cheerful and shy."):
        assert answers[said] > 10
    assert answers["I like riddles."] > 30 and answers["In the computer room."] > 30
    assert not any("{" in m["content"] for messages in made for m in messages)
    assert {len(messages) // 2 for messages in made} >= {1, 2, 3}
    asked = {m[-2]["content"] for m in made if m[-1]["content"] == "In the computer room."}
    assert len(asked) > 10  # the description has one wording
    assert says_who_it_is({"messages": messages} for messages in made)


def test_a_page_with_a_name_alone_is_enough():
    made = conversations(About("Ada"), 100)
    assert len(made) == 100 and not any("None" in m["content"] for c in made for m in c)


def test_more_than_the_page_gives_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(identity, "pairs", lambda about: [(("Who?", "Who is it?"), ("I.",))])
    with pytest.raises(InputError, match=r"--num 5000: .* gives only \d+ different ones; lower it or tell more"):
        conversations(About("Ada"), 5000)


def test_the_script_writes_a_file_that_training_reads(page: Path, tmp_path: Path, capsys: Any):
    out = tmp_path / "identity.jsonl"
    make_identity.main([f"--about={page}", f"--out={out}", "--num=50"])
    assert len(CustomJSON(out)) == 50
    assert f"--conversations={out}" in capsys.readouterr().out


# a larger model


class Server:
    """Answers chat completions as the test says; keeps what it was asked."""

    def __init__(self, answer: Callable[[int], tuple[int, str]]) -> None:
        self.requests: list[tuple[str | None, dict[str, Any]]] = []
        self.answer, self.lock = answer, threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append((self.headers.get("Authorization"), body))
                    status, text = outer.answer(len(outer.requests))
                self.send_response(status if self.path == "/v1/chat/completions" else 404)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


def said(content: Any) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []
    monkeypatch.setattr(completions, "FIRST_WAIT", 0.001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def start(answer: Callable[[int], tuple[int, str]]) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def ask(server: Server, page: Path, out: Path, *flags: str) -> None:
    make_identity.main([f"--about={page}", f"--out={out}", f"--endpoint={server.address}", "--model=big", *flags])


def test_a_server_writes_them_invalid_answers_are_left_out_and_a_fence_is_none(page, tmp_path, serve, capsys):
    answers = [f"Sure!\n```json\n{TALK}\n```", "I would rather not.", '{"messages": []}', TALK, None]
    server = serve(lambda n: (200, said(answers[n % len(answers)])))
    out = tmp_path / "out.jsonl"
    ask(server, page, out, "--num=7")
    assert [c["messages"] for c in CustomJSON(out)] == [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I am Ada."}]
    ] * 7
    assert "7 of 7 conversations" in capsys.readouterr().out
    prompts = {body["messages"][0]["content"] for _, body in server.requests}
    assert len(prompts) > len(server.requests) // 2 and all("Riverside" in prompt for prompt in prompts)
    assert all(body["model"] == "big" and key is None for key, body in server.requests)


def test_the_same_command_goes_on_behind_the_last_whole_line(page, tmp_path, serve):
    server = serve(lambda n: (200, said(TALK)))
    out = tmp_path / "out.jsonl"
    out.write_text('[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]\n[{"role"')
    ask(server, page, out, "--num=3", "--threads=1")
    assert len(server.requests) == 2 and len(CustomJSON(out)) == 3
    ask(server, page, out, "--num=3")
    assert len(server.requests) == 2


def test_a_busy_server_is_asked_again_and_the_key_comes_from_the_environment(page, tmp_path, serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = serve(lambda n: (429, "busy") if n % 3 else (200, said(TALK)))
    ask(server, page, tmp_path / "out.jsonl", "--num=2", "--threads=1")
    assert len(server.requests) == 6 and {key for key, _ in server.requests} == {"Bearer secret"}


@pytest.mark.parametrize(
    ("status", "text", "reason", "times"),
    [
        (401, '{"error":\n"no key"}', 'refused with status 401: {"error": "no key"}', 1),
        (503, "away", "refused with status 503: away", completions.TRIES),
        (200, "<html>", "another format than chat completions", 1),
        (200, said("no"), "answers in a row were no conversations; try another --model", make_identity.MOST_INVALID),
    ],
)
def test_a_server_that_gives_nothing_ends_in_one_line(page, tmp_path, serve, capsys, status, text, reason, times):
    server = serve(lambda n: (status, text))
    with pytest.raises(SystemExit) as stop:
        ask(server, page, tmp_path / "out.jsonl", "--num=1", "--threads=1")
    assert stop.value.code == 2 and len(server.requests) == times
    assert reason in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--endpoint=http://x/v1"], "--endpoint and --model go together"),
        (["--endpoint=x", "--model=y"], "begins with http"),
        (["--num=0"], "--num 0 must be at least 1"),
        (["--out=x.json"], "try x.json.jsonl"),
    ],
)
def test_wrong_flags_are_refused(page: Path, capsys: Any, flags: list[str], reason: str):
    with pytest.raises(SystemExit):
        make_identity.main([f"--about={page}", *flags])
    assert reason in capsys.readouterr().err


# questions in other words


def reworded(text: str, times: int = 300) -> set[str]:
    rng = random.Random(0)
    return {reword(text, rng) for _ in range(times)}


@pytest.mark.parametrize(
    ("question", "one_of_them"),
    [
        ("What is the color of the old mill?", "Can you tell me the color of the old mill?"),
        ("What is the color of the mill?", "Tell me the mill's color."),
        ("Tell me the name of my dog.", "What is my dog's name?"),
        ("Where is the key of the shed?", "Do you know where the key of the shed is?"),
        ("Who feeds the grey cat?", "I want to know who feeds the grey cat."),
        ("How many beds has the hut?", "How many beds has the hut"),
        ("What does Ada eat?", "Eat for Ada"),
    ],
)
def test_a_question_is_asked_in_other_words(question: str, one_of_them: str):
    found = reworded(question, 3000)
    assert {w.lower().rstrip(".?") for w in found} & {one_of_them.lower().rstrip(".?")} and len(found) > 100


def test_what_is_asked_for_and_of_whom_is_never_lost():
    for text in reworded("What is the password of the Blue Lodge?"):
        assert {"password", "blue", "lodge"} <= set(re.findall(r"\w+", text.lower()))


@pytest.mark.parametrize("text", ["Wie heißt du?", "Who are you?", "Hello!", "", "A first one. And a second one?"])
def test_what_no_rule_fits_stays_but_for_its_last_mark(text: str):
    assert {t.rstrip(".?!") for t in reworded(text)} == {text.rstrip(".?!")}


def variants(path: Path, times: int) -> list[list[dict[str, str]]]:
    """The first conversation's messages, again and again."""
    task = CustomJSON(path)
    wordings = Wordings(task)
    return [Reworded(task, wordings, number)[0]["messages"] for number in range(times)]


def test_a_reworded_task_keeps_answers_and_draws_the_same_again(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    messages = [{"role": "user", "content": "What is the color of the mill?"}, {"role": "assistant", "content": "Red."}]
    path.write_text(json.dumps(messages))
    found = variants(path, 20)
    assert len({v[0]["content"] for v in found}) > 8 and {v[1]["content"] for v in found} == {"Red."}
    assert found == variants(path, 20)


def test_words_are_left_out_only_while_the_rest_still_says_which_question_it_is(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    pairs = [
        ("What food does Ann like?", "Rice."),
        ("What pet has Ann?", "A cat."),
        ("What food does Bob like?", "Pie."),
    ]
    lines = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = Wordings(CustomJSON(path))
    assert task.has_one_answer(["Bob"]) and task.has_one_answer(["pet"]) and task.has_one_answer(["Ann", "food"])
    assert not any(map(task.has_one_answer, (["Ann"], ["food"], ["ann"], [], ["horse"])))
    asked = {v[0]["content"].lower() for v in variants(path, 200)}
    assert all("ann" in question and "food" in question for question in asked)


@pytest.mark.parametrize(
    ("pairs", "lent"),
    [
        pytest.param(
            [("What does Ada eat?", "Ada likes rice."), ("Which food does Ben like?", "Ben likes rice.")],
            [["Which food does Ada like?"], ["What does Ben eat?"]],
            id="one frame, one value in both",
        ),
        pytest.param(
            [("What does Ada eat?", "Ada likes rice."), ("Where is Ben?", "Ben is in Rome.")],
            [[], []],
            id="other frames",
        ),
        pytest.param(
            [("How old is Ada?", "Ada is ten."), ("How does Ben feel?", "Ben is tired.")],
            [[], []],
            id="one frame, but no value in both",
        ),
        pytest.param(
            [
                *[("What pet has Ada?", "Ada has a fox."), ("What toy has Ada?", "Ada has a kite.")],
                *[("What toy has Ben?", "Ben has a fox."), ("What pet has Eva?", "Eva has a kite.")],
            ],
            [[], [], [], []],
            id="a subject asked in both with different values",
        ),
        pytest.param(
            [("Does Ada sing?", "Yes, Ada does."), ("Can Ben cook?", "Yes, Ben does.")], [[], []], id="yes or no"
        ),
        pytest.param([("Wer ist da?", "Niemand."), ("", ""), ("Hi Bo", "Bo")], [[], [], []], id="nothing to lend"),
    ],
)
def test_questions_of_a_file_lend_each_other_their_wordings(pairs: list[tuple[str, str]], lent: list[list[str]]):
    assert borrowed(pairs) == lent


def test_a_wording_is_lent_at_whole_words_only():
    pairs = [("In which Annals is Ann?", "Ann is in two."), ("What names Ben?", "Ben is in two.")]
    assert borrowed(pairs) == [["What names Ann?"], ["In which Annals is Ben?"]]


def test_a_borrowed_wording_is_asked_as_the_files_own_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.jsonl"
    pairs = [("What does Ada eat?", "Ada likes rice."), ("Which food does Ben like?", "Ben likes rice.")]
    lines = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = [v[0]["content"].lower() for v in variants(path, 40)]
    assert any("food" in question for question in asked) and any("eat" in question for question in asked)
    assert all("ada" in question and "ben" not in question for question in asked)
    assert {v[1]["content"] for v in variants(path, 40)} == {"Ada likes rice."}
    monkeypatch.setattr(rewording, "BORROWERS", 1)  # more questions than may lend
    assert not any("food" in v[0]["content"].lower() for v in variants(path, 40))
