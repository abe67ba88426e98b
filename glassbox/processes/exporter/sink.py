"""One sink of the exporter process: opened, used, closed and tried again by itself.

Owns what keeps a sink from the others: every step of it is done in a thread of its own, which is waited for a few
seconds and no longer, and whatever it raises is this sink's error. A file on a server that is away, or a pipe that
nobody reads, blocks for ever; only the sink that has it does.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Generic, TypeVar

from glassbox.config.load import GlassboxConfig
from glassbox.core.errors import ErrorCounter

T = TypeVar("T")

# Opening may import a package or look a name up; what hangs for longer is left to itself.
OPEN_PATIENCE_S: Final = 15.0
PATIENCE_S: Final = 5.0
LONGEST_BACKOFF_S: Final = 60.0


@dataclass
class _Life(Generic[T]):
    """One go at a sink, and the thread that works on it: a step that hangs keeps its own until it ends."""

    wanted: object = None
    value: T | None = None
    failed: bool = False
    thread: threading.Thread | None = None
    since_s: float = 0.0

    @property
    def busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()


class Sink(Generic[T]):
    """A sink that is what the configuration says, as far as that can be had.

    Attributes:
        name: stage of its errors, and its label in the metrics.
        last_success_s: Unix time at which it last did all that was asked; 0 if it never has.

    Args:
        name: see above.
        errors: told of its failures.
        wants: what the sink has to be like, of a configuration; None if it isn't wanted. When that changes, it is
            closed and opened again.
        opens: makes it.
        closes: ends it; is told whether the sink is still wanted, in another form.
        works: whether one that was opened still does.
        adapts: when something else is wanted, an open one isn't closed: it follows at the next `give`.
        sends_later: it hands over to a thread, which itself tells `errors` of what came of it; returns the Unix time
            at which that last succeeded, None if all that it was given is as good as sent.
        last_success_s: of an exporter before this one.
        clock: seconds, for the time between attempts. unix: Unix time.
    """

    def __init__(
        self,
        name: str,
        errors: ErrorCounter,
        *,
        wants: Callable[[GlassboxConfig], object],
        opens: Callable[[GlassboxConfig], T],
        closes: Callable[[T, bool], None] = lambda _value, _wanted: None,
        works: Callable[[T], bool] = lambda _: True,
        adapts: bool = False,
        sends_later: Callable[[T], float | None] | None = None,
        last_success_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        unix: Callable[[], float] = time.time,
    ) -> None:
        self.name = name
        self.last_success_s = last_success_s
        self._errors = errors
        self._wants, self._opens, self._closes, self._works = wants, opens, closes, works
        self._adapts, self._sends_later = adapts, sends_later
        self._clock, self._unix = clock, unix
        self._life: _Life[T] = _Life()
        self._wanted: object = None
        self._unknown = False  # what is wanted can't even be told
        self._not_before, self._attempts, self._seen_failures = 0.0, 0, 0

    @property
    def value(self) -> T | None:
        """The sink itself, None while it isn't open."""
        return self._life.value

    @property
    def busy(self) -> bool:
        """Whether a step of it hangs."""
        return self._life.busy

    @property
    def is_wanted(self) -> bool:
        """Whether the configuration asked for it when it was last applied."""
        return self._unknown or self._wanted is not None

    def apply(self, config: GlassboxConfig) -> None:
        """Open, change or close it as a configuration says. Never raises; one that can't be opened is tried again
        after 1, 2, 4, ... at most 60 seconds, and at once when the configuration asks for something else."""
        try:
            wanted = self._wants(config)
            self._unknown = False
        except Exception as error:
            self._errors.count(self.name, error)
            wanted, self._unknown = None, True
        if wanted != self._wanted:
            self._wanted, self._not_before, self._attempts = wanted, 0.0, 0
            if self._life.busy:
                self._life = _Life()  # whatever hangs in the old one, it keeps
        life = self._life
        if life.busy:
            return  # `give` tells how long
        if life.value is not None and self._adapts and wanted is not None:
            life.wanted = wanted
        if life.value is not None and (life.wanted != wanted or not self._works(life.value)):
            self._step(life, PATIENCE_S, partial(self._close, life, life.value))
        if wanted is not None and life.value is None and not life.busy and self._clock() >= self._not_before:
            self._step(life, OPEN_PATIENCE_S, lambda: self._open(life, wanted, config))
            if life.value is None:
                self._not_before = self._clock() + min(2.0**self._attempts, LONGEST_BACKOFF_S)
                self._attempts += 1

    def _open(self, life: _Life[T], wanted: object, config: GlassboxConfig) -> None:
        life.value, life.wanted = self._opens(config), wanted
        self._attempts = 0

    def _close(self, life: _Life[T], value: T) -> None:
        life.value = None
        self._closes(value, self._wanted is not None)

    def give(self, work: Callable[[T], None] = lambda _: None) -> None:
        """Have it do something if it is open. Never raises, and waits a few seconds at most."""
        life, value = self._life, self._life.value
        if life.busy:
            self._errors.count(self.name, f"it hangs since {self._clock() - life.since_s:.0f} s")
        elif value is not None and self._step(life, PATIENCE_S, lambda: work(value)):
            self._note_success(value)

    def _note_success(self, value: T) -> None:
        if self._sends_later is None:
            self._errors.worked(self.name)
            self.last_success_s = self._unix()
            return
        sent_s = self._sends_later(value)
        failures = self._errors.counts().get(self.name, 0)
        if sent_s is None and failures == self._seen_failures:
            sent_s = self._unix()
        self.last_success_s = max(self.last_success_s, sent_s or 0.0)
        self._seen_failures = failures

    def _step(self, life: _Life[T], patience_s: float, step: Callable[[], None]) -> bool:
        """Do a step in a thread; True if it came to a good end in time."""

        def guarded() -> None:
            try:
                step()
            except Exception as error:  # of an SDK, a disk, a bad variable: the sink's, whatever it is
                life.failed = True
                self._errors.count(self.name, error)

        life.failed, life.since_s = False, self._clock()
        life.thread = threading.Thread(target=guarded, name=f"glassbox-{self.name}", daemon=True)
        life.thread.start()
        life.thread.join(patience_s)
        if life.busy:
            self._errors.count(self.name, f"it has not come to an end within {patience_s:g} s")
            return False
        return not life.failed

    def close(self) -> None:
        """Close it if it is open and doesn't hang."""
        life, value = self._life, self._life.value
        if value is not None and not life.busy:
            self._step(life, PATIENCE_S, lambda: self._close(life, value))
