"""The web page in a real browser, as a user sees it, against a scripted API: fixtures of the page's tests.

What the tests photograph goes to tests/screenshots/.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Locator, Page, expect, sync_playwright

from tests.fake_api import FakeApi, serving

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCREENSHOTS = Path(__file__).parent / "screenshots"
PHONE = {"viewport": {"width": 390, "height": 664}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}


@pytest.fixture(scope="module")
def server() -> Iterator[FakeApi]:
    api = FakeApi()
    with serving(api.app()) as api.url:
        yield api


@pytest.fixture
def api(server: FakeApi) -> FakeApi:
    server.reset()
    return server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One for a file of tests: as long as Playwright runs, nothing else can run an event loop in this thread."""
    if CHROMIUM is None:
        pytest.skip("needs a Chromium (Debian's package is named chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Chat:
    """The page as a user sees it."""

    def __init__(self, browser: Browser, url: str, **device: Any) -> None:
        self.context: BrowserContext = browser.new_context(base_url=url, **device)
        self.context.set_default_timeout(5_000)
        self.errors: list[str] = []
        self.page = self.open_tab()

    def open_tab(self) -> Page:
        page = self.context.new_page()
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: (self.errors.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("console", lambda message: self.errors.append(message.text) if is_error(message) else None)
        page.goto("/")
        return page

    @property
    def input(self) -> Locator:
        return self.page.get_by_role("textbox", name="Message", exact=True)

    @property
    def answer(self) -> Locator:
        return self.page.get_by_role("article", name="Answer").last

    @property
    def conversations(self) -> Locator:
        return self.page.locator("#conversations .title")

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True).last

    def send(self, text: str) -> None:
        """Send, and wait until the answer is over."""
        self.start(text)
        expect(self.button("Send")).to_be_visible()

    def start(self, text: str) -> None:
        self.input.fill(text)
        self.input.press("Enter")

    def shoot(self, name: str) -> None:
        SCREENSHOTS.mkdir(exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png")


def is_error(message: ConsoleMessage) -> bool:
    """A refused or broken request is logged by the browser itself."""
    return message.type == "error" and not message.text.startswith("Failed to load resource")


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Chat]]:
    """`open_page(url, **device)`; in the end no page may have had an error or an alert."""
    opened: list[Chat] = []

    def open_page(url: str, **device: Any) -> Chat:
        opened.append(Chat(browser, url, **device))
        return opened[-1]

    yield open_page
    for chat in opened:
        chat.context.close()
    assert [error for chat in opened for error in chat.errors] == []


@pytest.fixture
def chat(open_page: Callable[..., Chat], api: FakeApi) -> Chat:
    return open_page(api.url)


@pytest.fixture
def phone(open_page: Callable[..., Chat], api: FakeApi) -> Chat:
    return open_page(api.url, **PHONE)
