"""The configuration file for processes that may not run a watcher thread: looked at when somebody asks."""

import os
from collections.abc import Callable
from pathlib import Path

from glassbox.config.load import ConfigError, GlassboxConfig, load_config
from glassbox.core.files import FileVersion
from glassbox.core.logs import get_logger

logger = get_logger(__name__)


class ConfigFile:
    """The configuration file, read again when it changed: for processes that may not run a watcher thread.

    An edit that makes the file invalid keeps the last good configuration (the workers report it).

    Args:
        path: of the YAML file.
        config: what the caller loaded from it already; else it is loaded now.
        on_change: called, by whoever asks for the configuration, after a good edit was read.

    Raises:
        ConfigError: if there is no `config` and the file is bad.
    """

    def __init__(
        self,
        path: Path,
        config: GlassboxConfig | None = None,
        on_change: Callable[[GlassboxConfig], None] = lambda _: None,
    ) -> None:
        self._path = Path(path)
        self._on_change = on_change
        # What the caller loaded may be older than the file is now: the first call reads it.
        self._version = self._stat() if config is None else None
        self._config = load_config(self._path) if config is None else config

    def _stat(self) -> FileVersion | None:
        try:
            stat = os.stat(self._path)
        except OSError:
            return None
        return (stat.st_ino, stat.st_mtime_ns, stat.st_size)

    def __call__(self) -> GlassboxConfig:
        """The configuration of this moment."""
        version = self._stat()
        if version is not None and version != self._version:
            self._version = version
            try:
                self._config = load_config(self._path)
            except ConfigError as error:
                logger.debug("glassbox keeps the last good configuration: %s", error)
            else:
                self._on_change(self._config)
        return self._config
