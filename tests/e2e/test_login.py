"""Logging in with a real browser: to the live page and to the page of one request, by a key that no address holds."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

import bcrypt
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect

from glassbox.config.load import GlassboxConfig, HttpConfig
from glassbox.export.family_source import FamilySource
from glassbox.processes.exporter.http import HttpServer
from glassbox.store.snapshot import write_snapshot
from glassbox.store.trace_directory import traces_path
from glassbox.store.trace_record import write_trace
from glassbox.web.app import make_app
from glassbox.web.doors import Door
from tests.browser import Watched, watched_page
from tests.export_samples import make_snapshot
from tests.trace_samples import make_trace

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

TOKEN: Final = "0123456789abcdef0123456789abcdef"
CONFIG: Final = GlassboxConfig.model_validate({"export": {"interval_s": 0.1}})


class Site:
    """A server behind a door that remembers whom it answered what."""

    def __init__(self, folder: Path, **http: str) -> None:
        run_dir = folder / "run"
        write_snapshot(run_dir, make_snapshot())
        write_trace(traces_path(run_dir), make_trace(request_id="a/b c", attention=False, top_k=4))
        door = Door(HttpConfig.model_validate(http), "127.0.0.1")
        app = make_app(FamilySource(run_dir, lambda: CONFIG), rules=lambda: door.rules)
        self.requests: list[tuple[str, dict[bytes, bytes]]] = []

        async def remembered(scope: Any, receive: Any, send: Any) -> None:
            self.requests.append((scope["path"] + "?" + scope["query_string"].decode(), dict(scope["headers"])))
            await app(scope, receive, send)

        remembered.state = app.state  # type: ignore[attr-defined]
        self.server = HttpServer(0, remembered, "127.0.0.1", door)  # type: ignore[arg-type]
        self.url = f"http://127.0.0.1:{self.server.port}/glassbox"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One that asks for a token."""
    folder = tmp_path_factory.mktemp("site")
    file = folder / "tokens"
    file.write_text(TOKEN)
    file.chmod(0o600)
    made = Site(folder, token_file=str(file))
    yield made
    made.server.close()


@pytest.fixture
def visitor(browser: Browser, site: Site) -> Iterator[Watched]:
    """Who has no key yet; the browser complains of the refusals alone, and no address ever holds the key."""
    site.requests.clear()
    with watched_page(browser) as watched:
        yield watched
        assert [] == [line for line in watched.complaints if "401" not in line and "favicon" not in line]
        assert site.requests
        for address, headers in site.requests:
            assert TOKEN not in address
            assert TOKEN.encode() not in headers.get(b"referer", b"")
            assert TOKEN.encode() not in headers.get(b"cookie", b"")


def log_in(watched: Watched, key: str) -> None:
    watched.page.fill("#key", key)
    watched.page.keyboard.press("Enter")


class TestLivePage:
    def test_it_asks_for_the_key_and_then_lives(self, visitor: Watched, site: Site) -> None:
        """A wrong key is said; the right one brings the stream, and is kept for the tab."""
        page = visitor.page
        page.goto(f"{site.url}/#statistic=top1_ratio")
        expect(page.locator("#login-text")).to_have_text("The server asks for its API key or token.")
        expect(page.locator("#status-text")).to_have_text("Locked")
        expect(page.locator("#key")).to_be_focused()
        log_in(visitor, "wrong")
        expect(page.locator("#login-text")).to_have_text("This key is not the server's; try another one.")
        log_in(visitor, "schlüssel")
        expect(page.locator("#login-text")).to_have_text("A key has printable ASCII characters alone.")
        log_in(visitor, TOKEN)
        page.wait_for_selector("#map[data-frames]")
        expect(page.locator("#login")).to_be_hidden()
        assert "top1_ratio" in page.url
        page.reload()
        page.wait_for_selector("#map[data-frames]")
        expect(page.locator("#login")).to_be_hidden()
        assert page.evaluate("Object.values(sessionStorage).length") == 1
        assert page.evaluate("Object.values(localStorage).length + document.cookie.length") == 0

    def test_its_links_work_with_it(self, visitor: Watched, site: Site) -> None:
        """The snapshot and the list of requests, as JSON, without asking again."""
        page = visitor.page
        page.goto(f"{site.url}/")
        log_in(visitor, TOKEN)
        page.wait_for_selector("#map[data-frames]")
        for link, expected in (("This view as JSON", '"engines":[{'), ("Traced requests (JSON)", '"a/b c"')):
            page.click(f"text={link}")
            expect(page.locator("pre")).to_contain_text(expected)
            page.go_back()
            page.wait_for_selector("#map[data-frames]")

    def test_another_tab_has_to_log_in_itself(self, visitor: Watched, site: Site) -> None:
        """A key lasts as long as its tab."""
        visitor.page.goto(f"{site.url}/")
        log_in(visitor, TOKEN)
        visitor.page.wait_for_selector("#map[data-frames]")
        other = visitor.page.context.new_page()
        other.goto(f"{site.url}/")
        expect(other.locator("#login")).to_be_visible()

    def test_a_key_that_is_taken_back_is_asked_for_again(self, visitor: Watched, site: Site) -> None:
        """The stream ends and can't be opened again: the form is there."""
        page = visitor.page
        page.goto(f"{site.url}/")
        log_in(visitor, TOKEN)
        page.wait_for_selector("#map[data-frames]")
        page.evaluate("sessionStorage.setItem('glassbox.key', 'old')")
        page.select_option("#statistic", "max_logit")
        expect(page.locator("#login-text")).to_have_text("This key is not the server's; try another one.")
        log_in(visitor, TOKEN)
        expect(page.locator("#login")).to_be_hidden()


class TestPageOfARequest:
    def test_it_asks_and_is_then_the_page(self, visitor: Watched, site: Site) -> None:
        """As without a key: its script and its styles run, at its own address."""
        page = visitor.page
        page.goto(f"{site.url}/v1/requests/a/b%20c?format=html")
        expect(page.locator("#message")).to_have_text("This page needs the server's key.")
        log_in(visitor, "wrong")
        expect(page.locator("#message")).to_have_text("This key is not the server's; try another one.")
        log_in(visitor, TOKEN)
        expect(page.locator("#title")).to_contain_text("a/b c")
        assert page.locator("#attended tbody tr").count() == 4
        assert page.url.endswith("/v1/requests/a/b%20c?format=html")
        assert page.evaluate("getComputedStyle(document.querySelector('.columns')).display") == "grid"
        page.reload()
        expect(page.locator("#title")).to_contain_text("a/b c")

    def test_nothing_tells_whether_there_is_one(self, visitor: Watched, site: Site) -> None:
        """Without the key; with it the error is shown."""
        page = visitor.page
        page.goto(f"{site.url}/v1/requests/none?format=html")
        expect(page.locator("#message")).to_have_text("This page needs the server's key.")
        log_in(visitor, TOKEN)
        expect(page.locator("pre")).to_contain_text("request_id must be of a traced request")
        visitor.complaints.clear()  # of the 404


class TestAccessibility:
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("path", ["/", "/v1/requests/none"])
    def test_axe_finds_nothing(self, visitor: Watched, site: Site, path: str, scheme: Literal["light", "dark"]) -> None:
        """Both forms, in both schemes."""
        visitor.page.emulate_media(color_scheme=scheme)
        visitor.page.goto(f"{site.url}{path}")
        expect(visitor.page.locator("#key")).to_be_visible()
        found = Axe().run(visitor.page).response["violations"]
        assert [] == [(violation["id"], violation["nodes"][0]["html"][:80]) for violation in found]


class TestPassword:
    def test_the_browser_itself_asks(self, browser: Browser, tmp_path: Path) -> None:
        """Basic authentication: with the password everything is there, stream included; without, nothing."""
        file = tmp_path / "users"
        file.write_text("ann:" + bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode())
        file.chmod(0o600)
        site = Site(tmp_path, users_file=str(file))
        try:
            with watched_page(browser, http_credentials={"username": "ann", "password": "secret"}) as watched:
                watched.open(f"{site.url}/")
                watched.page.goto(f"{site.url}/v1/requests/a/b%20c?format=html")
                expect(watched.page.locator("#title")).to_contain_text("a/b c")
            with watched_page(browser, http_credentials={"username": "ann", "password": "wrong"}) as watched:
                watched.page.goto(f"{site.url}/")
                assert watched.page.locator("#map").count() == 0
        finally:
            site.server.close()
