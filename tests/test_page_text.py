"""What the web page makes of texts, which must never be run; its looks; and that all hands can use it."""

from __future__ import annotations

import re
import threading

import pytest
from playwright.sync_api import expect

from nanochat.server.page import STATIC

pytest_plugins = ["tests.page_driver"]

MARKDOWN = """# Capitals

Here are **two capitals**, *briefly*, in `inline code`, and ~~three~~ a [map](https://example.com/map "big").
2*3*4 is 24, snake_case_name is one word, 5 < 6 & so on.

| Country | Capital | People |
|:--------|:-------:|-------:|
| France  | Paris   |    2.1 |
| Italy   | `Rome`  |    2.8 |

3. First find the country.
4. Then look:
   - in the table,

     or
   - in an atlas.

> A capital is where
the government sits.
> - or so they say

- [ ] loose

- list

***

```python
def capital(country):

    return "<b>Paris</b>"
```
Done\\*. See https://example.com/a_b_c.
"""
ATTACKS = """<script>alert(1)</script> <img src=x onerror=alert(1)> <svg onload=alert(1)>
[a](javascript:alert(1)) [b](java&#10;script:alert(1)) [c](data:text/html,<script>alert(1)</script>)
<javascript:alert(1)> ![d](javascript:alert(1)) [e](vbscript:x) [f](//example.com) [g](https://example.com/"onclick="alert(1))
| <img src=x onerror=alert(1)> |
|---|
| <iframe srcdoc="<script>alert(1)</script>"> |
```"><img src=x onerror=alert(1)>
</code></pre><script>alert(1)</script>
```
"""


# ---- markdown ---------------------------------------------------------------------------------------------------


def test_markdown(chat, api):
    api.will_say(MARKDOWN)
    chat.send("go")
    body = chat.answer.locator(".markdown")
    shapes = body.locator(":scope > *").evaluate_all("nodes => nodes.map((node) => `${node.tagName}${node.className}`)")
    assert shapes == ["H3", "P", "DIVtable", "OL", "BLOCKQUOTE", "UL", "HR", "FIGUREcode", "P"]
    expect(body.locator("p").first).to_have_text(
        "Here are two capitals, briefly, in inline code, and three a map."
        "2*3*4 is 24, snake_case_name is one word, 5 < 6 & so on."
    )
    for tag, text in (("strong", "two capitals"), ("p > em", "briefly"), ("p > code", "inline code"), ("del", "three")):
        expect(body.locator(tag)).to_have_text(text)
    expect(body.get_by_role("link")).to_have_text(["map", "https://example.com/a_b_c"])
    expect(body.get_by_role("link").first).to_have_attribute("rel", "noopener noreferrer")
    expect(body.locator("th")).to_have_text(["Country", "Capital", "People"])
    expect(body.locator("td")).to_have_text(["France", "Paris", "2.1", "Italy", "Rome", "2.8"])
    expect(body.locator("td").nth(2)).to_have_class("right")
    expect(body.locator("ol")).to_have_attribute("start", "3")
    expect(body.locator("ol ul > li")).to_have_text(["in the table,or", "in an atlas."])
    expect(body.locator("blockquote p")).to_have_text("A capital is wherethe government sits.")
    expect(body.locator("blockquote li")).to_have_text("or so they say")
    expect(body.locator("figure figcaption span")).to_have_text("python")
    assert body.locator("pre").inner_text() == 'def capital(country):\n\n    return "<b>Paris</b>"'
    expect(body.locator("p").last).to_have_text("Done*. See https://example.com/a_b_c.")
    chat.shoot("markdown")


def test_a_growing_text_is_drawn_as_the_whole_one(chat):
    """Whatever the pieces: only the last blocks are drawn again."""
    different = chat.page.evaluate(
        """async (texts) => {
            const { MarkdownView } = await import("/static/markdown.js");
            const draw = (...steps) => {
                const view = new MarkdownView(document.createElement("div"));
                steps.forEach((text) => view.update(text));
                return new XMLSerializer().serializeToString(view.element);
            };
            const wrong = [];
            for (const text of texts) {
                const growing = new MarkdownView(document.createElement("div"));
                for (let i = 1; i <= text.length; i++) {
                    growing.update(text.slice(0, i));
                    const now = new XMLSerializer().serializeToString(growing.element);
                    if (now !== draw(text.slice(0, i))) wrong.push(text.slice(0, i));
                }
            }
            return wrong;
        }""",
        [MARKDOWN, ATTACKS, "- a\n\n-\n\n- b\n\n  c\n1\n\n2. d\n\n3. e\n\n\tf\n\n---\n| a |\n|--|\n> > x\n```\n```\ny"],
    )
    assert different == []


def test_no_text_makes_the_page_stand_still(chat):
    pieces = ["*", "**a ", "***", "_a", "~~", "`", "\\", "<", "[", "[a](", "[a](b ", "![a](b(", "http://"]
    pieces += ["> ", "- ", "# ", "|", "a\n", "```\n", "|\n", "| |\n|-|\n", "- a\n\n", "  - a\n", ">\n"]
    times = chat.page.evaluate(
        """async (texts) => {
            const { MarkdownView } = await import("/static/markdown.js");
            return texts.map((text) => {
                const start = performance.now();
                new MarkdownView(document.createElement("div")).update(text);
                return performance.now() - start;
            });
        }""",
        [piece * (30_000 // len(piece)) for piece in pieces],
    )
    slow = {piece: milliseconds for piece, milliseconds in zip(pieces, times, strict=True) if milliseconds > 2000}
    assert not slow  # some 50 ms; what is quadratic takes minutes


def test_an_answer_of_10000_tokens_does_not_freeze_the_page(chat, api):
    paragraph = "".join(f"word{i} " for i in range(49)) + "\n\n"
    pieces = re.findall(r"\S+\s+", paragraph * 100 + "```\n" + paragraph * 100)
    gate = threading.Event()
    api.will_say(*pieces[:490], gate, *(step for i in range(490, 9800, 50) for step in (*pieces[i : i + 50], 0.005)))
    chat.start("much")
    first = chat.answer.locator("p").first
    expect(chat.answer.locator("p")).to_have_count(10)
    first.evaluate("""node => {
        node.isTheSame = true;
        window.longest = 0;   // milliseconds in which the page did not react
        let last = performance.now();
        const tick = () => {
            window.longest = Math.max(window.longest, performance.now() - last);
            last = performance.now();
            setTimeout(tick);
        };
        tick();
    }""")
    gate.set()
    expect(chat.answer).to_have_attribute("aria-busy", "false", timeout=20_000)
    assert len(chat.answer.locator(".body").inner_text()) > 50_000
    assert first.evaluate("node => node.isTheSame")  # what is finished is not drawn again
    assert chat.page.evaluate("window.longest") < 2000


# ---- nothing is run ---------------------------------------------------------------------------------------------


def test_no_text_of_a_user_a_model_or_a_tool_becomes_html(chat, api):
    api.will_say(ATTACKS, ("python", ATTACKS), ("python_output", ATTACKS), ATTACKS)
    chat.send(ATTACKS)
    chat.page.reload()
    expect(chat.answer.locator(".tool")).to_have_count(1)
    assert chat.page.locator("script").count() == 1  # the page's own
    ours = chat.page.locator("#messages, #sidebar, header")
    injected = ours.locator("img, iframe, script, [onerror], [onload], [onclick]")
    assert injected.evaluate_all("nodes => nodes.map((node) => node.outerHTML)") == ['<img src="/logo.svg" alt="">']
    links = chat.page.locator("#messages a").evaluate_all("nodes => nodes.map((n) => n.href)")
    assert links == ["https://example.com/%22onclick=%22alert(1)"] * 2
    expect(chat.conversations).to_have_text([ATTACKS.split("\n")[0][:80]])
    expect(chat.answer.locator(".tool .call")).to_have_text(ATTACKS)
    expect(chat.answer.locator("td").last).to_have_text('<iframe srcdoc="<script>alert(1)</script>">')
    chat.shoot("attacks")


def test_nonsense_in_the_storage_is_passed_over(chat):
    chat.send("good")
    chat.page.evaluate("""() => {
        localStorage.setItem("nanochat.conversation.a", "{");
        localStorage.setItem("nanochat.conversation.b", '{"id": "b", "title": "b", "system": "", "messages": [null]}');
        localStorage.setItem("nanochat.settings", "[1]");
    }""")
    chat.page.reload()
    expect(chat.conversations).to_have_text(["good"])


def test_the_browser_itself_would_refuse_scripts_and_html(chat):
    refused = chat.page.evaluate("""() => {
        try { document.body.innerHTML = "<b>x</b>"; return "taken"; } catch (error) { return error.name; }
    }""")
    assert refused == "TypeError"
    chat.errors.clear()  # the browser has told


def test_the_files_load_nothing_from_elsewhere():
    for path in STATIC.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://\w|innerHTML|insertAdjacentHTML|document\.write|style=", text), path


# ---- looks and hands --------------------------------------------------------------------------------------------


def test_a_phone_has_no_sideways_scrolling_and_a_drawer(phone, api):
    wide = ["wide" * 100, "```", "wide " * 100, "```", "|" + "wide|" * 30, "|" + "-|" * 30]
    api.will_say(MARKDOWN + "\n".join(wide))
    phone.send("x" * 300)
    assert phone.page.evaluate("document.documentElement.scrollWidth") == 390
    assert phone.page.locator("#scroll").evaluate("node => node.scrollWidth <= node.clientWidth")
    expect(phone.page.locator("#sidebar")).to_be_hidden()
    phone.shoot("phone")
    phone.page.locator("#menu").tap()
    expect(phone.button("New conversation")).to_be_focused()
    expect(phone.button("Delete " + "x" * 80)).to_be_in_viewport()
    phone.shoot("phone-drawer")
    phone.button("New conversation").tap()
    expect(phone.page.locator("#sidebar")).to_be_hidden()
    expect(phone.page.get_by_role("article")).to_have_count(0)


def test_everything_works_by_keyboard(chat, api):
    page = chat.page
    expect(chat.input).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    api.will_say("slow", threading.Event())
    page.keyboard.press("Enter")
    expect(chat.answer.locator(".body")).to_have_text("slow")
    page.keyboard.press("Escape")
    expect(chat.answer).to_contain_text("Stopped.")
    assert api.requests[0]["messages"][0]["content"] == "one\ntwo"
    for name in ("Copy answer", "Try again", "Edit and send again", "Copy message"):
        page.keyboard.press("Shift+Tab")
        focused = page.locator(":focus")
        expect(focused).to_have_accessible_name(name)
        assert focused.evaluate("node => getComputedStyle(node).outlineStyle") == "solid"
    page.keyboard.press("Control+Shift+N")
    expect(page.get_by_role("article")).to_have_count(0)
    expect(chat.input).to_be_focused()


def test_every_control_has_a_name(chat, api):
    api.will_say(MARKDOWN, ("python", "1"), ("python_output", "1"))
    chat.send("hi")
    chat.button("Settings").click()
    controls = "button:visible, input:visible, textarea:visible, summary:visible, [role=region], [role=log], [role=img]"
    for control in chat.page.locator(controls).all():
        expect(control).to_have_accessible_name(re.compile(r"\w"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_systems_scheme_or_the_users(chat, api, scheme):
    chat.page.emulate_media(color_scheme=scheme)
    api.will_say(MARKDOWN, ("python", "6*7"), ("python_output", "42"), dropped=2)
    chat.send("hi")
    back = {"light": "rgb(255, 255, 255)", "dark": "rgb(23, 25, 29)"}
    other = "dark" if scheme == "light" else "light"
    expect(chat.page.locator("body")).to_have_css("background-color", back[scheme])
    chat.shoot(scheme)
    chat.button("Light or dark").click()
    chat.page.reload()
    expect(chat.page.locator("body")).to_have_css("background-color", back[other])
    chat.button("Light or dark").click()
    expect(chat.page.locator("body")).to_have_css("background-color", back[scheme])


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_texts_stand_out_from_their_backgrounds(scheme):
    """WCAG 2 AA: 4.5 to 1 for text, 3 to 1 for what can be typed into."""
    css = (STATIC / "page.css").read_text(encoding="utf-8")
    color = {name: pair[scheme] for name, *pair in re.findall(r"--([\w-]+): light-dark\(#(\w{6}), #(\w{6})\)", css)}
    pairs = [(text, back) for text in ("text", "faint") for back in ("back", "side", "raised", "hover", "user")]
    pairs += [("accent", "back"), ("on-accent", "accent"), ("bad", "bad-back")]
    for text, back in pairs:
        assert contrast(color[text], color[back]) >= 4.5, (text, back)
    assert contrast(color["edge"], color["back"]) >= 3


def contrast(one: str, other: str) -> float:
    """Of two sRGB colours, by WCAG 2.2's relative luminance."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_the_page_scrolls_with_the_answer_unless_the_user_has_scrolled_up(chat, api):
    gate = threading.Event()
    lines = [f"line {i}\n\n" for i in range(40)]
    api.will_say(*lines, gate, *lines, 0.2, "end")
    chat.start("hi")
    distance = "node => node.scrollHeight - node.scrollTop - node.clientHeight"
    scroll = chat.page.locator("#scroll")
    expect(chat.answer).to_contain_text("line 39")
    assert scroll.evaluate(distance) < 2
    chat.page.mouse.move(600, 300)
    chat.page.mouse.wheel(0, -400)
    expect(chat.button("To the latest message")).to_be_visible()
    top = scroll.evaluate("node => node.scrollTop")
    gate.set()
    expect(chat.answer).to_contain_text("end")
    assert scroll.evaluate("node => node.scrollTop") == top
    chat.button("To the latest message").click()
    expect(chat.button("To the latest message")).to_be_hidden()
    assert scroll.evaluate(distance) < 2


def test_those_who_want_no_motion_get_none(chat, api):
    chat.page.emulate_media(reduced_motion="reduce")
    api.will_say(threading.Event())
    chat.start("hi")
    expect(chat.page.locator(".dots i").first).to_have_css("animation-name", "none")
