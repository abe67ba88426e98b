"""Watches a configuration file while the server runs.

Owns the watching thread (`FileWatcher`), and asking it to look at a configuration (`ConfigWatcher`); what a new content
leads to is `follow.py`'s.

Watched is the file's directory, because editors replace a file by rename and Kubernetes replaces a symlink
beside it (`..data`). Events alone are not enough: a symlink may lead into a directory that is not watched,
the directory itself may be replaced, network file systems send no events. So the file's identity is also
looked at twice a second.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import watchfiles

from glassbox.config.follow import ConfigFollower, ReloadStatus
from glassbox.config.load import ConfigError, GlassboxConfig
from glassbox.config.usable import Trial
from glassbox.core.affinity import leave_workers_cores
from glassbox.core.logs import get_logger

# How long a burst of events may grow, and the silence that ends it: a truncate and the write after it are one
# change. watchfiles wakes up, and asks for the interpreter's lock, once per silence, events or not.
_DEBOUNCE_MS: Final = 500
_SILENCE_MS: Final = 250
_LOOK_EVERY_MS: Final = 500
_POLL_MS: Final = 300
# Of Kubernetes' ConfigMap and Secret volumes: the symlink that is swapped when the content changes.
_KUBERNETES_LINK: Final = "..data"

_Signature = tuple[int, int, int, int] | None


class FileWatcher:
    """Calls back, from a daemon thread, whenever the file may have changed.

    Args:
        path: the file; it and its directory may come and go.
        on_event: called after each event at the file and whenever its inode, size or modification time
            differ; also once when the watching begins. What it raises is logged, and ends nothing.
        name: of the thread.
    """

    def __init__(self, path: Path, on_event: Callable[[], None], name: str) -> None:
        # Not resolved: it is the name that is watched, and what it leads to may change.
        self._path = path.absolute()
        self._on_event = on_event
        self._name = name
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """True while the thread lives; in a forked child it does not."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Begin watching; does nothing if it has begun."""
        if self.running:
            return
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(self._stop,), name=self._name, daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 1.0) -> None:
        """End watching and wait for the thread, at most `timeout_s`."""
        self._stop.set()
        # A callback may stop the watching; it can't wait for its own thread.
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def wait(self, seconds: float) -> bool:
        """Sleep for a callback; True at once if the watching is to end."""
        return self._stop.wait(seconds)

    def _run(self, stop: threading.Event) -> None:
        """Watch until `stop`; whatever fails is logged, and the watching begins anew."""
        failed = False
        while not stop.is_set():
            try:
                self._watch(stop)
            except BaseException:  # a panic in watchfiles' compiled part is no Exception
                # Once, not twice a second: what fails again is the same.
                get_logger(__name__).log(
                    logging.DEBUG if failed else logging.ERROR,
                    "Watching %s failed; glassbox looks at it again and again",
                    self._path,
                    exc_info=True,
                )
                failed = True
                # At least look, should watching itself be what fails.
                with contextlib.suppress(Exception):
                    self._on_event()
                stop.wait(_LOOK_EVERY_MS / 1000)

    def _watch(self, stop: threading.Event) -> None:
        # On a core of the worker the thread would take time from the computation whenever it looks.
        leave_workers_cores(0)
        force_polling: bool | None = None  # watchfiles' own choice: the kernel's events if they are to be had
        signature: _Signature = None
        first = True
        while not stop.is_set():
            directory = _inode(self._path.parent)
            try:
                for touched in self._events(stop, force_polling):
                    now = _signature(self._path)
                    if first or touched or now != signature:
                        self._on_event()
                    first, signature = False, now
                    if _inode(self._path.parent) != directory:
                        break
            except (OSError, RuntimeError) as error:
                # No directory, no inotify, or no watch left of the user's share of them.
                if directory is not None and not force_polling:
                    force_polling = True
                    get_logger(__name__).debug("No file events for %s (%s): polling", self._path, error)
                    continue
                now = _signature(self._path)
                if first or now != signature:
                    self._on_event()
                first, signature = False, now
                stop.wait(_LOOK_EVERY_MS / 1000)

    def _events(self, stop: threading.Event, force_polling: bool | None) -> Iterator[bool]:
        """Yield, at least every half second, whether there was an event at the file."""
        names = {self._path.name, _KUBERNETES_LINK}
        for changes in watchfiles.watch(
            self._path.parent,
            watch_filter=None,
            debounce=_DEBOUNCE_MS,
            step=_SILENCE_MS,
            stop_event=stop,
            rust_timeout=_LOOK_EVERY_MS,
            yield_on_timeout=True,
            raise_interrupt=False,
            force_polling=force_polling,
            poll_delay_ms=_POLL_MS,
            recursive=False,
            ignore_permission_denied=True,
        ):
            yield any(os.path.basename(changed) in names for _, changed in changes)


def _signature(path: Path) -> _Signature:
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino)


class ConfigWatcher:
    """Watches a configuration file and hands on every good edit.

    Callbacks run in the watcher's daemon thread, one at a time; but `start`, which reads the file, calls them
    in its caller's thread. An exception from a callback is logged and shown in `status`; it does not end the
    watching.

    Args:
        path: the file. It may be read-only, replaced by rename, behind symlinks, deleted and made again.
        on_change: called with the new configuration when the file is good and means something new.
        on_error: called once for each distinct bad content in a row; the last good configuration stays in
            use.
        on_recovery: called with the configuration that stays when a bad file is good again and says what it said
            before, so that `on_change` has nothing to tell.
        initial: what the caller has loaded from `path` already, so that an edit between its loading and
            `start` is not missed. Without it, what the file says at `start` is the first configuration, and
            `on_change` is not called for it.
        also: tries more of an edit; see `usable.require_usable`.
        clock: unix time in seconds.
    """

    def __init__(
        self,
        path: Path | str,
        on_change: Callable[[GlassboxConfig], None],
        on_error: Callable[[ConfigError], None],
        *,
        on_recovery: Callable[[GlassboxConfig], None] = lambda config: None,
        initial: GlassboxConfig | None = None,
        also: Trial | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._follower = ConfigFollower(
            Path(path), on_change, on_error, on_recovery=on_recovery, initial=initial, also=also, clock=clock
        )
        self._files = FileWatcher(Path(path), self._look, name="glassbox-config-watcher")

    @property
    def current(self) -> GlassboxConfig | None:
        """The last good configuration; None before the first."""
        return self._follower.current

    @property
    def status(self) -> ReloadStatus:
        """How the last reading went."""
        return self._follower.status

    def start(self) -> None:
        """Read the file and watch it from now on. Does nothing if it is watched already."""
        if not self._files.running:
            self._follower.look()
            self._files.start()

    def stop(self) -> None:
        """End the watching; returns within a second. Does nothing if it is not watched."""
        self._files.stop()

    def _look(self) -> None:
        self._follower.look(ended=self._files.wait)
