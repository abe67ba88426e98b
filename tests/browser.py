"""A real Chromium for tests: the system's, headless, that remembers what the page said and whom it asked."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.serving import require_tool

# Nothing but the page may use the network; the rest is what a browser needs in a container.
_FLAGS: Final = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
# Two cores may be busy with attention meanwhile.
TIMEOUT_MS: Final = 60_000
expect.set_options(timeout=TIMEOUT_MS)  # else five seconds, whatever a page's own limit is


@contextmanager
def chromium() -> Iterator[Browser]:
    """A running browser with a fresh profile; skips the test where none is installed."""
    path = require_tool("chromium", "chromium")
    with sync_playwright() as playwright:
        # Playwright makes a profile of its own and removes it.
        browser = playwright.chromium.launch(executable_path=path, args=list(_FLAGS), timeout=3 * TIMEOUT_MS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Watched:
    """A page and what it did.

    Attributes:
        page: of Playwright.
        complaints: errors and warnings of its console, and exceptions nobody caught.
        hosts: host and port of every request.
    """

    page: Page
    complaints: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def open(self, url: str) -> None:
        """Load the page and wait until its map is painted."""
        self.page.goto(url)
        self.page.wait_for_selector("#map[data-frames]", timeout=TIMEOUT_MS)

    def shown(self) -> dict[str, Any]:
        """What is on the screen, as numbers: `values` layer by layer (null for NaN), `layers`, `heads`, `window`..."""
        return dict(
            self.page.evaluate(
                """() => {
                    const { values, kinds, layers, heads, window, startS, kind, comparing, scale } = glassbox.shown;
                    const plain = (numbers) => Array.from(numbers, (value) => (Number.isNaN(value) ? null : value));
                    return {
                        values: plain(values), rows: plain(kinds.rows), layers, heads, window, startS, kind, comparing,
                        low: scale.low, high: scale.high,
                    };
                }"""
            )
        )


@contextmanager
def watched_page(browser: Browser, **options: Any) -> Iterator[Watched]:
    """A page in a context of its own (no storage, no cache); `options` are those of `new_context`."""
    context = browser.new_context(**options)
    try:
        page = context.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        watched = Watched(page)
        page.on(
            "console",
            lambda message: message.type in {"error", "warning"} and watched.complaints.append(message.text),
        )
        page.on("pageerror", lambda error: watched.complaints.append(str(error)))
        page.on("request", lambda request: watched.hosts.add(urlsplit(request.url).netloc))
        yield watched
    finally:
        context.close()
