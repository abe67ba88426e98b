"""`glassbox top` in a terminal: a real process on a pseudo-terminal, its screen read by a terminal emulator."""

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from typing import Self

import pyte
import pytest

from tests.export_samples import changed, make_snapshot
from tests.metrics_pages import PageServer, later, metrics_page

SNAPSHOT = make_snapshot(layers=tuple(range(40)), heads=2)
PAGE = metrics_page([SNAPSHOT], "layer")
_TIMEOUT_S = 30.0
# These would count for more than the terminal's own size; pytest-xdist sets one of them.
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "LINES"}}


class Terminal:
    """A process on a pseudo-terminal of a given size.

    Attributes:
        screen: what it shows.
        process: exits with `status()`.
    """

    def __init__(self, *command: str, columns: int = 100, lines: int = 30) -> None:
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self._handle, inner = pty.openpty()
        self._set_size(columns, lines)
        self.settings = termios.tcgetattr(self._handle)
        self.sent = b""
        self.process = subprocess.Popen(
            # A shell's background job ignores SIGINT, and so does whatever it starts; nobody's terminal is like that.
            ["env", "--default-signal=INT", *command],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            env={**_ENVIRONMENT, "TERM": "xterm-256color", "COLORTERM": "truecolor"},
        )
        os.close(inner)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._handle)

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display)

    def read(self, timeout_s: float = 0.05) -> bool:
        """Take what comes within that time; False at the end."""
        ready, _, _ = select.select([self._handle], [], [], timeout_s)
        if not ready:
            return True
        with contextlib.suppress(OSError):  # EIO: the process has closed its end
            if data := os.read(self._handle, 65536):
                self.sent += data
                self._stream.feed(data)
                return True
        return False

    def wait(self, accept: Callable[[str], bool], what: str) -> str:
        """The screen once it is accepted."""
        deadline = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < deadline:
            self.read()
            if accept(self.text):
                return self.text
        pytest.fail(f"waited for {what}; the screen:\n{self.text}")

    def press(self, keys: str) -> None:
        os.write(self._handle, keys.encode())

    def resize(self, columns: int, lines: int) -> None:
        self.screen.resize(lines, columns)
        self._set_size(columns, lines)

    def _set_size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._handle, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def status(self) -> int:
        """Exit status, after the rest of the output."""
        deadline = time.monotonic() + _TIMEOUT_S
        while self.process.poll() is None and time.monotonic() < deadline:
            self.read()
        while self.read(0.2) and time.monotonic() < deadline and select.select([self._handle], [], [], 0)[0]:
            pass
        return self.process.wait(1)

    def restored(self) -> bool:
        """The terminal has its settings again, and its own screen with the cursor."""
        same = self.settings[:4] == termios.tcgetattr(self._handle)[:4]
        return same and self.sent.rstrip().endswith((b"\x1b[?1049l\x1b[?25h", b"\x1b[?25h", b"\x1b[?1049l"))


@pytest.fixture
def server() -> Iterator[PageServer]:
    running = PageServer(PAGE)
    yield running
    with contextlib.suppress(OSError):
        running.close()


def start(url: str, *options: str) -> Terminal:
    return Terminal(sys.executable, "-m", "glassbox.cli", "top", url, "--interval", "0.2", *options)


class TestTerminal:
    def test_shows_changes_takes_keys_and_gives_the_terminal_back(self, server: PageServer) -> None:
        """First all, then rates; keys change phase, order and columns; `q` ends with status 0."""
        with start(server.url) as terminal:
            first = terminal.wait(lambda text: "q quit" in text, "the first frame")
            assert "tiny/model" in first
            assert "1-22 of 40" in first
            server.body = metrics_page([later(SNAPSHOT, 1)], "layer")
            terminal.wait(lambda text: "rows/s" in text and "steps 1,100 (" in text, "rates")
            terminal.press("p")
            terminal.wait(lambda text: "prefill rows, last" in text, "the other phase")
            terminal.press("r")
            terminal.wait(lambda text: "\n39" in text, "the other order")
            terminal.press("r\x1b[F")
            terminal.wait(lambda text: "-40 of 40" in text, "the end of the table")
            terminal.press("q")
            assert 0 == terminal.status()
            assert terminal.restored()

    def test_follows_the_size_of_the_window(self, server: PageServer) -> None:
        """Narrow: fewer columns. Large: all layers."""
        with start(server.url) as terminal:
            terminal.wait(lambda text: "distance" in text, "seven columns")
            terminal.resize(44, 20)
            narrow = terminal.wait(lambda text: "distance" not in text and "1-12 of 40" in text, "fewer columns")
            assert "entropy" in narrow
            terminal.resize(160, 60)
            terminal.wait(lambda text: "lookback" in text and "\n39 " in text, "all layers")

    def test_a_server_that_goes_away_is_waited_for(self, server: PageServer) -> None:
        """An error page, then a restarted server: it says so and goes on."""
        with start(server.url) as terminal:
            terminal.wait(lambda text: "since the start" in text, "the first frame")
            server.status = 503
            gone = terminal.wait(lambda text: "No answer for" in text, "the loss")
            assert "HTTP 503" in gone
            assert "\n0 " in gone
            server.status = 200
            server.body = metrics_page([changed(SNAPSHOT, steps=5)], "layer")
            back = terminal.wait(lambda text: "began anew" in text, "the new server")
            assert "No answer" not in back
            server.close()
            terminal.wait(lambda text: "can't read" in text, "the closed port")
            terminal.press("q")
            assert 0 == terminal.status()

    @pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
    def test_signals_give_the_terminal_back(self, number: signal.Signals, status: int, server: PageServer) -> None:
        """Ctrl-C is how one ends it; SIGTERM has its own status."""
        with start(server.url) as terminal:
            terminal.wait(lambda text: "since the start" in text, "the first frame")
            terminal.process.send_signal(number)
            assert status == terminal.status()
            assert terminal.restored()
            assert b"Traceback" not in terminal.sent
