"""What a user does on the web page, and what the page does when things go wrong."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tasks.customjson import parse_line
from tests.fake_api import CUT
from tests.tiny_engine import TOKENIZER, scripted_engine, special
from tests.tiny_server import END, START, serving

pytest_plugins = ["tests.page_driver"]

# ---- an answer --------------------------------------------------------------------------------------------------


def test_an_answer_streams_and_its_counts_stand_below(chat, api):
    gate = threading.Event()
    api.will_say("Hello", ", ", 0.15, "dear", gate, " user.")
    chat.start("hi")
    expect(chat.answer.locator(".body")).to_have_text("Hello, dear")
    expect(chat.answer).to_have_attribute("aria-busy", "true")
    assert chat.input.input_value() == ""
    gate.set()
    expect(chat.answer).to_have_attribute("aria-busy", "false")
    expect(chat.answer.locator(".body")).to_have_text("Hello, dear user.")
    counts = chat.answer.locator(".stats").inner_text().replace("\xa0", " ")
    assert re.fullmatch(r"4 tokens · \d+\.\d tokens/s · first after \d\.\d\d s · prompt 20 \(8 cached\)", counts)
    expect(chat.page.locator("#announce")).to_have_text("Hello, dear user.")
    assert api.requests[0]["messages"] == [{"role": "user", "content": "hi"}]
    assert "temperature" not in api.requests[0]  # what the user has not set is the server's choice


def test_a_tool_call_stands_apart_and_goes_back_as_it_was(chat, api):
    call = ("python", "12/"), ("python", "60"), ("python_output", "0.2")
    api.will_say("That is ", *call, " of an hour.")
    chat.send("12 minutes?")
    tool = chat.answer.locator(".tool")
    expect(tool.locator("summary")).to_contain_text(re.compile(r"Tool\s*12/60\s*0\.2"))
    tool.locator("summary").click()
    expect(tool.locator("dl")).to_have_text("Call12/60Result0.2")
    chat.shoot("tool")
    chat.send("sure?")
    parts = [("text", "That is "), ("python", "12/60"), ("python_output", "0.2"), ("text", " of an hour.")]
    sent = api.requests[1]["messages"][1]
    assert sent == {"role": "assistant", "content": [{"type": type_, "text": text} for type_, text in parts]}


def test_dropped_turns_and_a_cut_answer_are_told(chat, api):
    api.will_say("a b", dropped=4, finish="length")
    chat.send("hi")
    expect(chat.answer).to_contain_text("the oldest 4 messages were dropped")
    expect(chat.answer).to_contain_text("cut at the token limit")


def test_an_empty_answer_is_told_and_not_sent_back(chat, api):
    api.will_say()
    chat.send("hi")
    expect(chat.answer).to_contain_text("The answer is empty.")
    chat.send("hello?")
    assert [m["role"] for m in api.requests[1]["messages"]] == ["user", "user"]


def test_stop_keeps_what_came_and_frees_the_server(chat, api):
    api.will_say("One, ", "two", threading.Event())
    chat.start("count")
    expect(chat.answer.locator(".body")).to_have_text("One, two")
    chat.input.press("Enter")  # does not cut it short
    chat.button("Stop").click()
    expect(chat.answer).to_contain_text("Stopped.")
    expect(chat.answer.locator(".body")).to_have_text("One, two")
    chat.send("go on")
    assert [m["content"] for m in api.requests[1]["messages"]] == ["count", "One, two", "go on"]
    assert api.left == 1


def test_write_anew_replaces_the_answer(chat, api):
    api.will_say("first")
    api.will_say("second")
    chat.send("hi")
    chat.button("Write this answer anew").click()
    expect(chat.answer.locator(".body")).to_have_text("second")
    expect(chat.page.get_by_role("article")).to_have_count(2)
    assert api.requests[0]["messages"] == api.requests[1]["messages"]


def test_to_write_an_older_answer_anew_asks_before_what_follows_is_lost(chat, api):
    chat.send("one")
    chat.send("two")
    anew = chat.page.get_by_role("button", name="Write this answer anew").first
    anew.click()
    expect(chat.page.get_by_role("dialog")).to_contain_text("What follows (2 messages) is deleted.")
    chat.button("Cancel").click()
    assert len(api.requests) == 2
    anew.click()
    chat.button("Write anew").click()
    expect(chat.page.get_by_role("article")).to_have_count(2)


def test_edit_and_send_again(chat, api):
    chat.send("one")
    chat.send("two")
    first = chat.page.get_by_role("article", name="You").first
    first.hover()
    first.get_by_role("button", name="Edit and send again").click()
    expect(first).to_contain_text("What follows (3 messages) is replaced.")
    box = chat.page.get_by_role("textbox", name="Edited message")
    box.press("Escape")
    expect(chat.page.get_by_role("article")).to_have_count(4)  # nothing happened
    first.get_by_role("button", name="Edit and send again").click()
    box.fill("uno")
    box.press("Enter")
    expect(chat.answer.locator(".body")).to_have_text("You said: uno")
    expect(chat.page.get_by_role("article")).to_have_count(2)
    expect(chat.conversations).to_have_text(["uno"])
    assert api.requests[-1]["messages"] == [{"role": "user", "content": "uno"}]


def test_a_message_edited_meanwhile_ends_its_answer(chat, api):
    gate = threading.Event()
    api.will_say("slow", gate, "late")
    chat.start("one")
    expect(chat.answer.locator(".body")).to_have_text("slow")
    chat.page.get_by_role("article", name="You").hover()
    chat.button("Edit and send again").click()
    chat.page.get_by_role("textbox", name="Edited message").fill("two")
    chat.page.keyboard.press("Enter")
    expect(chat.answer.locator(".body")).to_have_text("You said: two")
    assert api.left == 1
    gate.set()
    chat.send("three")
    assert [m["content"] for m in api.requests[-1]["messages"]] == ["two", "You said: two", "three"]


def test_copying_gives_the_text_as_it_was_written(chat, api):
    chat.context.grant_permissions(["clipboard-read", "clipboard-write"])
    api.will_say("**Run** this:\n```sh\nls  -l <x>\n```")
    chat.send("hi")
    for name, text in (
        ("Copy code", "ls  -l <x>"),
        ("Copy answer", "**Run** this:\n```sh\nls  -l <x>\n```"),
        ("Copy message", "hi"),
    ):
        chat.page.get_by_role("article").first.hover()
        chat.button(name).click()
        expect(chat.button(name)).to_have_attribute("title", "Copied")
        assert chat.page.evaluate("navigator.clipboard.readText()") == text


# ---- conversations ----------------------------------------------------------------------------------------------


def test_conversations_live_through_a_reload(chat, api):
    api.will_say("It is ", ("python", "6*7"), ("python_output", "42"), ".")
    chat.send("six times seven")
    chat.page.reload()
    expect(chat.answer.locator(".body")).to_contain_text("It is")
    expect(chat.answer.locator(".tool .result")).to_have_text("42")
    expect(chat.answer.locator(".stats")).to_contain_text("4\xa0tokens")
    chat.send("more")
    assert len(api.requests[1]["messages"]) == 3


def test_several_conversations(chat, api):
    chat.send("apples")
    chat.button("New conversation").click()
    expect(chat.page.get_by_role("article")).to_have_count(0)
    chat.send("pears")
    expect(chat.conversations).to_have_text(["pears", "apples"])
    chat.conversations.nth(1).click()
    expect(chat.answer.locator(".body")).to_have_text("You said: apples")

    chat.conversations.nth(1).hover()
    chat.button("Rename apples").click()
    chat.page.get_by_label("Title").fill("fruit")
    chat.page.keyboard.press("Enter")
    expect(chat.conversations).to_have_text(["pears", "fruit"])
    chat.conversations.nth(0).hover()
    chat.button("Delete pears").click()
    chat.button("Delete").click()
    chat.page.reload()
    expect(chat.conversations).to_have_text(["fruit"])
    expect(chat.page.get_by_role("heading", name="fruit")).to_be_visible()


def test_an_answer_goes_on_while_another_conversation_is_open(chat, api):
    gate = threading.Event()
    api.will_say("slow", gate, " but sure")
    chat.start("first")
    expect(chat.answer.locator(".body")).to_have_text("slow")
    chat.button("New conversation").click()
    expect(chat.page.get_by_role("img", name="Being answered")).to_be_visible()
    chat.send("second")
    gate.set()
    expect(chat.page.get_by_role("img", name="Being answered")).to_have_count(0)
    chat.conversations.filter(has_text="first").click()
    expect(chat.answer.locator(".body")).to_have_text("slow but sure")


def test_export_is_what_training_takes(chat, api):
    api.will_say("It is ", ("python", "6*7"), ("python_output", "42"))
    chat.send("six times seven")
    api.will_refuse(503, "shutting down")
    chat.send("lost")
    chat.send("found")
    chat.button("New conversation").click()
    api.will_refuse(503, "shutting down")
    chat.send("never answered")
    with chat.page.expect_download() as download:
        chat.button("Export all as JSONL").click()
    lines = Path(download.value.path()).read_text(encoding="utf-8").splitlines()
    conversation = parse_line(lines[0], "line 1")
    assert len(lines) == 1
    assert [m["content"] for m in conversation["messages"][2:]] == ["lost\n\nfound", "You said: found"]
    assert conversation["messages"][1]["content"][1] == {"type": "python", "text": "6*7"}


def test_two_tabs_do_not_undo_each_others_work(chat):
    chat.send("first tab")
    other = chat.open_tab()
    chat.send("again")
    other.get_by_role("textbox", name="Message", exact=True).fill("second tab")
    other.keyboard.press("Enter")
    expect(chat.conversations).to_have_text(["second tab", "first tab"])
    other.locator("#conversations .title", has_text="first tab").click()
    expect(other.get_by_role("article")).to_have_count(4)


@pytest.mark.parametrize(
    ("trouble", "told"), [("QuotaExceededError", "storage is full"), ("SecurityError", "keeps nothing")]
)
def test_storage_that_is_full_or_blocked_breaks_nothing(chat, trouble, told):
    chat.context.add_init_script(f"""
        for (const name of ["getItem", "setItem", "removeItem"]) {{
            Storage.prototype[name] = () => {{ throw new DOMException("no", "{trouble}"); }};
        }}""")
    chat.page.reload()
    chat.send("one")
    expect(chat.page.locator("#trouble")).to_contain_text(told)
    chat.button("New conversation").click()
    chat.send("two")
    chat.conversations.nth(1).click()
    expect(chat.answer.locator(".body")).to_have_text("You said: one")


# ---- settings and commands --------------------------------------------------------------------------------------


def test_settings_go_with_every_request_and_stay(chat, api):
    chat.button("Settings").click()
    chat.page.get_by_label("System prompt").fill("Be brief.")
    chat.page.get_by_label("Temperature").fill("3")
    chat.button("Save").click()
    expect(chat.page.get_by_role("dialog")).to_be_visible()  # 3 is too hot
    for label, value in (("Temperature", "0.5"), ("Top-k", "20"), ("Top-p", "0.9"), ("at most", "64"), ("Seed", "7")):
        chat.page.get_by_label(label).fill(value)
    chat.shoot("settings")
    chat.button("Save").click()
    chat.page.reload()
    chat.send("hi")
    request = api.requests[0]
    expected = {"temperature": 0.5, "top_k": 20, "top_p": 0.9, "max_tokens": 64, "seed": 7}
    assert {name: request[name] for name in expected} == expected
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    expect(chat.page.locator(".system")).to_contain_text("Be brief.")


def test_slash_commands_are_answered_by_the_page(chat, api):
    chat.start("/help")
    expect(chat.page.locator(".local").last).to_contain_text("/temperature 0.8")
    for line, key, value in (("/temperature 0", "temperature", 0), ("/topk 5", "top_k", 5)):
        chat.start(line)
        chat.send("hi")
        assert api.requests[-1][key] == value
    for line, told in (
        ("/temperature 2.1", "from 0 to 2"),
        ("/topk 1.5", "whole number"),
        ("/nonsense", "/help lists"),
    ):
        chat.start(line)
        expect(chat.page.get_by_role("alert")).to_contain_text(told)
        expect(chat.input).to_have_value(line)  # to be corrected
    chat.send("/etc/hosts is a file")
    assert api.requests[-1]["messages"][-1]["content"] == "/etc/hosts is a file"
    chat.start("/clear")
    expect(chat.page.get_by_role("article")).to_have_count(0)
    expect(chat.conversations).to_have_count(1)


# ---- what goes wrong --------------------------------------------------------------------------------------------


def test_a_broken_line_keeps_what_came_and_can_be_tried_again(chat, api):
    gate = threading.Event()
    api.will_say("Half of", gate, CUT)
    chat.start("hi")
    expect(chat.answer.locator(".body")).to_have_text("Half of")
    gate.set()
    expect(chat.page.get_by_role("alert")).to_contain_text("The connection broke off.")
    expect(chat.answer.locator(".body")).to_have_text("Half of")
    chat.shoot("broken")
    chat.page.reload()
    expect(chat.answer.locator(".body")).to_have_text("Half of")
    chat.button("Try again").click()
    expect(chat.answer.locator(".body")).to_have_text("You said: hi")


def test_a_server_that_is_away_is_told_and_found_again(chat, api):
    chat.send("one")
    chat.context.set_offline(True)
    chat.start("two")
    expect(chat.answer).to_contain_text("The server cannot be reached.")
    expect(chat.page.locator("#away")).to_contain_text("Trying again")
    chat.context.set_offline(False)
    expect(chat.page.locator("#away")).to_be_hidden()
    chat.button("Try again").click()
    expect(chat.answer.locator(".body")).to_have_text("You said: two")


def test_a_page_closed_meanwhile_has_what_came(chat, api):
    api.will_say("so far", threading.Event())
    chat.start("hi")
    expect(chat.answer.locator(".body")).to_have_text("so far")
    chat.page.reload()
    expect(chat.answer.locator(".body")).to_have_text("so far")
    expect(chat.page.get_by_role("alert")).to_contain_text("The connection broke off.")


def test_refusals_are_shown_in_the_servers_words(chat, api):
    chat.send("hi")
    for status, message in ((400, "bad"), (413, "too large"), (503, "shutting down")):
        api.will_refuse(status, message)
        chat.start("again")
        expect(chat.page.get_by_role("alert").last).to_have_text(f"{message}Try again")
    api.will_refuse(429, "the queue is full.", **{"Retry-After": "3"})
    chat.button("Try again").click()
    expect(chat.page.get_by_role("alert").last).to_contain_text("the queue is full. Try again in 3 seconds.")
    chat.button("Try again").click()
    expect(chat.answer.locator(".body")).to_have_text("You said: again")


def test_a_wanted_api_key_is_asked_for_and_kept_in_the_tab(chat, api):
    api.key = "sesame"
    chat.start("hi")
    for attempt in ("wrong", "sesame"):
        expect(chat.page.get_by_role("dialog", name="API key")).to_be_visible()
        chat.page.get_by_role("textbox", name="Key").fill(attempt)
        chat.page.keyboard.press("Enter")
        expect(chat.page.locator("#ask-input")).to_have_value("")
    expect(chat.answer.locator(".body")).to_have_text("You said: hi")
    chat.page.reload()
    chat.send("again")
    expect(chat.answer.locator(".body")).to_have_text("You said: again")
    assert "sesame" not in json.dumps(chat.page.evaluate("({...localStorage})"))


# ---- the real server --------------------------------------------------------------------------------------------


def test_the_page_and_the_server_understand_each_other(open_page):
    call = (special("python_start"), *b"6*7", special("python_end"), special("output_end"))
    engine = scripted_engine(TOKENIZER, START, *b"So", *call, *b".", END)
    with serving(engine, api_key="sesame", model="d8", temperature=0.0) as client:
        chat = open_page(str(client.base_url))
        chat.start("hi")
        chat.page.get_by_role("textbox", name="Key").fill("sesame")
        chat.page.keyboard.press("Enter")
        expect(chat.answer.locator(".tool .call")).to_have_text("6*7")
        expect(chat.answer.locator(".tool .result")).to_have_text("42")
        expect(chat.answer.locator(".markdown")).to_have_text(["So", "."])
        expect(chat.answer.locator(".stats")).to_contain_text("prompt")
        expect(chat.page.locator("#model")).to_have_text("d8")
        chat.send("x" * 30)
        expect(chat.answer).to_contain_text("the oldest 2 messages were dropped")
        chat.send("y" * 100)
        expect(chat.answer.get_by_role("alert")).to_contain_text("context is 64")
