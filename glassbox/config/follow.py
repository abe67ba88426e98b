"""Follows a configuration file: what a new content leads to, whoever notices it.

Owns reading the file again, keeping the last good configuration, and telling of changes. It is asked to look: by a
thread where one may run (`watch.py`), or whenever somebody wants the configuration (`ConfigFile`).
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from glassbox.config.load import ConfigError, GlassboxConfig, load_config, parse_config, read_bytes
from glassbox.config.usable import Trial, require_usable
from glassbox.core.files import file_version
from glassbox.core.logs import get_logger

logger = get_logger(__name__)

# A bad content counts if it is still there after this: it may be half written.
SETTLE_S: Final = 0.2

_Argument = TypeVar("_Argument")


@dataclass(frozen=True)
class ReloadStatus:
    """How the last reading of the file went.

    Attributes:
        successful: False while the file is bad (or gone) and the last good configuration is kept.
        timestamp_s: unix time at which the file was last found good.
        error: the message if not successful.
    """

    successful: bool
    timestamp_s: float
    error: str | None = None


class ConfigFollower:
    """A configuration file and the last good configuration in it. Not thread-safe: one thread looks.

    An exception from a callback is logged and shown in `status`; it does not end the following.

    Args:
        path: the file. It may be read-only, replaced by rename, behind symlinks, deleted and made again.
        on_change, on_error, on_recovery, initial, also, clock: see `watch.ConfigWatcher`.

    Attributes:
        current: the last good configuration; None before the first.
        status: how the last reading went.
    """

    def __init__(
        self,
        path: Path,
        on_change: Callable[[GlassboxConfig], None],
        on_error: Callable[[ConfigError], None],
        *,
        on_recovery: Callable[[GlassboxConfig], None] = lambda config: None,
        initial: GlassboxConfig | None = None,
        also: Trial | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path, self._also = path, also
        self._on_change, self._on_error, self._on_recovery = on_change, on_error, on_recovery
        self._clock = clock
        self.current = initial
        self.status = ReloadStatus(successful=True, timestamp_s=clock())
        self._seen: bytes | str | None = None  # content, or why there is none, at the last reading

    def look(self, ended: Callable[[float], bool] | None = None) -> None:
        """Read the file if its content is another one, and call back.

        Args:
            ended: sleeps for that many seconds, and tells whether following has ended meanwhile; None takes a bad
                content as it is, else it must still be there after `SETTLE_S`.
        """
        content, outcome = self._read()
        if content == self._seen:
            return
        first = self._seen is None
        if ended is not None and isinstance(outcome, ConfigError):
            if ended(SETTLE_S):
                return
            content, outcome = self._read()
            if content == self._seen:
                return
        self._seen = content
        if isinstance(outcome, ConfigError):
            self.status = ReloadStatus(False, self.status.timestamp_s, str(outcome))
            self._call(self._on_error, outcome)
            return
        # The first reading is no news to whoever has none; a good one after a bad start is.
        news = outcome != self.current and not (first and self.current is None)
        recovered = not self.status.successful
        self.current = outcome
        self.status = ReloadStatus(True, self._clock())
        if news:
            self._call(self._on_change, outcome)
        elif recovered:
            self._call(self._on_recovery, outcome)

    def _read(self) -> tuple[bytes | str, GlassboxConfig | ConfigError]:
        content: bytes | str
        try:
            content = read_bytes(self._path)
        except ConfigError as error:
            return str(error), error
        try:
            config = parse_config(self._path, content)
            require_usable(self._path, config, self.current, self._also)
        except ConfigError as error:
            return content, error
        except Exception as error:  # else the last word of a thread, after which no edit would be seen
            logger.exception("Reading %s failed", self._path)
            return content, ConfigError(self._path, f"can't be read ({type(error).__name__}: {error})")
        return content, config

    def _call(self, callback: Callable[[_Argument], None], argument: _Argument) -> None:
        try:
            callback(argument)
        except Exception as error:
            message = f"applying {self._path} failed: {type(error).__name__}: {error}"
            self.status = ReloadStatus(False, self.status.timestamp_s, " ".join(message.split()))
            logger.exception("Applying %s failed", self._path)


class ConfigFile:
    """The configuration file for processes that may not run a watcher thread: looked at when somebody asks.

    An edit that makes the file invalid keeps the last good configuration (the workers report it).

    Args:
        path: of the YAML file.
        config: what the caller loaded from it already; else it is loaded now.
        on_change: called, by whoever asks for the configuration, after a good edit was read.
        also: tries more of an edit; see `usable.require_usable`.

    Raises:
        ConfigError: if there is no `config` and the file is bad.
    """

    def __init__(
        self,
        path: Path,
        config: GlassboxConfig | None = None,
        on_change: Callable[[GlassboxConfig], None] = lambda _: None,
        also: Trial | None = None,
    ) -> None:
        self._path = Path(path)
        self._lock = threading.Lock()
        # What the caller loaded may be older than the file is now: the first call reads it.
        self._version = file_version(self._path) if config is None else None
        self._config = load_config(self._path) if config is None else config
        self._follower = ConfigFollower(self._path, on_change, _keep_last_good, initial=self._config, also=also)

    def __call__(self) -> GlassboxConfig:
        """The configuration of this moment."""
        version = file_version(self._path)
        if version is not None and version != self._version:
            with self._lock:  # a scrape and a request may ask at once
                self._version = version
                self._follower.look()
        return self._follower.current or self._config


def _keep_last_good(error: ConfigError) -> None:
    logger.debug("glassbox keeps the last good configuration: %s", error)
