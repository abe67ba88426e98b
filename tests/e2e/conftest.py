"""What tests of the pages share."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from tests.browser import Watched, chromium, watched_page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Without a window, one for a module's tests."""
    with chromium() as browser:
        yield browser


@pytest.fixture
def watched(browser: Browser) -> Iterator[Watched]:
    """A page as wide as a desk's; the test fails if it complained."""
    with watched_page(browser, viewport={"width": 1360, "height": 900}) as watched:
        yield watched
        assert [] == watched.complaints
