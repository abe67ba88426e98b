"""The process's live settings: the YAML as it stands in vLLM's backend registry, kept fresh by one watcher.

Owns the configuration in force and the state of reloading. Where it is published and read back (`adapter/publish.py`)
is passed in; what the YAML may say is `load.py`'s.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glassbox.config.load import ConfigError, GlassboxConfig, changes, restart_needed
from glassbox.config.usable import Trial
from glassbox.config.watch import ConfigWatcher, ReloadStatus
from glassbox.core.logs import get_logger, set_level

logger = get_logger(__name__)


class Settings:
    """Configuration of this process.

    Args:
        path: the YAML file, absolute.
        config: as loaded from it.
        publish, read: where the configuration is kept: vLLM's registry, by `adapter/publish.py`.
        also: tries more of an edit; see `usable.require_usable`.
    """

    def __init__(
        self,
        path: Path,
        config: GlassboxConfig,
        *,
        publish: Callable[[GlassboxConfig], None],
        read: Callable[[], dict[str, Any] | None],
        also: Trial | None = None,
    ) -> None:
        self.path, self._also = path, also
        self.started_with = config
        self._loaded = ReloadStatus(successful=True, timestamp_s=time.time(), error=None)
        self._publish, self._read = publish, read
        # The registry's object and what it says, in one: two threads may find a new object at once.
        self._parsed: tuple[dict[str, Any] | None, GlassboxConfig] = (None, config)
        self._watcher: ConfigWatcher | None = None
        self._subscribers: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        publish(config)
        set_level(config.log_level)

    @property
    def config(self) -> GlassboxConfig:
        """The configuration in force. Cheap: parsed again only when the registry's object changed."""
        raw = self._read()
        parsed_from, config = self._parsed
        # None: somebody cleared it; what was parsed last stays in force.
        if raw is not None and raw is not parsed_from:
            config = GlassboxConfig.model_validate(raw)
            self._parsed = (raw, config)
        return config

    @property
    def status(self) -> ReloadStatus:
        """How the last reading of the file went."""
        watcher = self._watcher
        return self._loaded if watcher is None else watcher.status

    def subscribe(self, on_reload: Callable[[], None]) -> Callable[[], None]:
        """Call `on_reload` (from the watcher's thread) after each reload, good or bad; returns the undo."""
        self._subscribers.append(on_reload)
        return lambda: self._subscribers.remove(on_reload)

    def watch(self) -> None:
        """Start following the file; does nothing the second time. Workers do; others look when they are scraped."""
        with self._lock:
            if self._watcher is None:
                self._watcher = ConfigWatcher(
                    self.path,
                    self._on_change,
                    self._on_error,
                    on_recovery=self._on_recovery,
                    initial=self.config,
                    also=self._also,
                )
                self._watcher.start()

    def close(self) -> None:
        """Stop following the file."""
        with self._lock:
            watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.stop()

    def _on_change(self, config: GlassboxConfig) -> None:
        before = self.config
        set_level(config.log_level)
        self._publish(config)
        logger.info("Reloaded %s: %s", self.path, ", ".join(changes(before, config)) or "nothing changed")
        for message in restart_needed(self.started_with, config):
            logger.warning("%s: %s", self.path.name, message)
        self._notify()

    def _on_error(self, error: ConfigError) -> None:
        logger.error("%s. The last good configuration stays in force.", error)
        self._notify()

    def _on_recovery(self, _config: GlassboxConfig) -> None:
        logger.info("%s is good again and says what is in force", self.path)
        self._notify()

    def _notify(self) -> None:
        for subscriber in list(self._subscribers):
            subscriber()
