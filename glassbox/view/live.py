"""The loop of `glassbox top`: asks the server in a thread, takes keys, draws when there is something new.

Owns the terminal's state while it runs, and gives it back as it was.
"""

import contextlib
import os
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any, Final, TypeVar

from rich.console import Console
from rich.live import Live

from glassbox.core.statistics import Phase
from glassbox.view.frame import Look, frame, last_scroll, sort_keys
from glassbox.view.measured import Measured, ViewError, exported_statistics
from glassbox.view.over_time import Watch

_Item = TypeVar("_Item")

_TICK_S: Final = 0.1
MIN_INTERVAL_S: Final = 0.2
MAX_INTERVAL_S: Final = 3600.0
_ESCAPES: Final = {
    "[A": "up", "[B": "down", "[5~": "page up", "[6~": "page down", "[H": "home", "[F": "end", "OA": "up", "OB": "down",
}  # fmt: skip


class _Poller(threading.Thread):
    """Asks again and again; a daemon, because an answer that doesn't come must not keep the program."""

    def __init__(self, ask: Callable[[], Measured], interval_s: float) -> None:
        super().__init__(name="glassbox-top", daemon=True)
        self.interval_s = interval_s
        self.answers: SimpleQueue[Measured | ViewError] = SimpleQueue()
        self.again = threading.Event()
        self._ask = ask

    def run(self) -> None:
        took_s = 0.0
        while True:
            # A page with all heads is megabytes, which the server must write: it has most of the time to itself.
            self.again.wait(max(self.interval_s, 2 * took_s))
            self.again.clear()
            begin = time.monotonic()
            try:
                self.answers.put(self._ask())
            except ViewError as error:
                self.answers.put(error)
            except Exception as error:  # else the numbers would stand still, and nobody would say so
                self.answers.put(ViewError(f"the answer can't be read ({type(error).__name__}: {error})"))
            took_s = time.monotonic() - begin


def run(ask: Callable[[], Measured], first: Measured, look: Look, console: Console) -> None:
    """Show the server until `q` or Ctrl-C.

    Args:
        ask: gives its totals of the moment, or raises ViewError.
        first: what it gave already.
        look: at the beginning; keys change it.
        console: a terminal.
    """
    watch = Watch()
    watch.take(first)
    poller = _Poller(ask, look.interval_s)
    poller.start()
    with _terminal() as keys, Live(console=console, screen=True, auto_refresh=False) as live:
        drawn: object = None
        while True:
            while True:
                try:
                    answer = poller.answers.get_nowait()
                except Empty:
                    break
                if isinstance(answer, ViewError):
                    watch.fail(str(answer), time.time())
                elif not look.paused:
                    watch.take(answer)
            # Once a second at least: "No answer for ..." counts on.
            state = (look, console.size, watch.answered_s, watch.problem, int(time.time()))
            if state != drawn:
                live.update(frame(watch, look, time.time(), *console.size), refresh=True)
                drawn = state
            for key in keys(_TICK_S):
                if key == "q":
                    return
                look = press(key, look, last_scroll(watch, look, time.time(), *console.size))
                poller.interval_s = look.interval_s
                if key in "+-":
                    poller.again.set()


def press(key: str, look: Look, last: int) -> Look:
    """What is shown after a key. An unknown key changes nothing.

    Args:
        last: the largest `scroll`, at which the table's last line is seen.
    """
    scroll = {"up": -1, "down": 1, "page up": -10, "page down": 10, "home": -last, "end": last}
    if key in scroll:
        return replace(look, scroll=min(max(min(look.scroll, last) + scroll[key], 0), last))
    statistics, sorts, phases = exported_statistics(), sort_keys(), [Phase.DECODE, Phase.PREFILL, None]
    changes: dict[str, Callable[[], dict[str, Any]]] = {
        "t": lambda: {"focus": _next(statistics, look.focus)},
        "T": lambda: {"focus": _next(statistics, look.focus, -1)},
        "s": lambda: {"sort": _next(sorts, look.sort), "scroll": 0},
        "S": lambda: {"sort": _next(sorts, look.sort, -1), "scroll": 0},
        "r": lambda: {"reverse": not look.reverse, "scroll": 0},
        "p": lambda: {"phase": _next(phases, look.phase)},
        "h": lambda: {"by_head": not look.by_head, "scroll": 0},
        " ": lambda: {"paused": not look.paused},
        "+": lambda: {"interval_s": min(look.interval_s * 2, MAX_INTERVAL_S)},
        "-": lambda: {"interval_s": max(look.interval_s / 2, MIN_INTERVAL_S)},
    }
    return replace(look, **changes[key]()) if key in changes else look


def _next(items: Sequence[_Item], item: _Item, step: int = 1) -> _Item:
    return items[(items.index(item) + step) % len(items)]


def parse_keys(text: str) -> list[str]:
    """What a terminal sent, as characters and names of keys."""
    keys = []
    while text:
        escape = next((code for code in _ESCAPES if text.startswith(f"\x1b{code}")), None)
        if escape is not None:
            keys.append(_ESCAPES[escape])
            text = text[1 + len(escape) :]
        else:
            keys.append(text[0])
            text = text[1:]
    return keys


@contextlib.contextmanager
def _terminal() -> Iterator[Callable[[float], list[str]]]:
    """Keys come at once and unseen, SIGTERM ends in order; all of it is taken back.

    Gives a function that waits so many seconds for keys. Without a terminal to type at it only waits.
    """

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    handle = sys.stdin.fileno() if sys.stdin.isatty() else None
    settings = termios.tcgetattr(handle) if handle is not None else None

    def keys(timeout_s: float) -> list[str]:
        if handle is None:
            time.sleep(timeout_s)
            return []
        ready, _, _ = select.select([handle], [], [], timeout_s)
        if not ready:
            return []
        data = os.read(handle, 256)
        # A terminal that is gone gives nothing, again and again.
        return parse_keys(data.decode(errors="ignore")) if data else ["q"]

    try:
        if handle is not None:
            tty.setcbreak(handle)
        yield keys
    finally:
        if handle is not None and settings is not None:
            termios.tcsetattr(handle, termios.TCSADRAIN, settings)
        signal.signal(signal.SIGTERM, before)
