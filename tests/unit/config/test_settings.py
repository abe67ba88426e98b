"""A process's live settings: published once, read back, followed, and never worse than before."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from glassbox.config.load import GlassboxConfig
from glassbox.config.settings import Settings
from tests.waiting import wait_for


class FakeRegistry:
    """Where the configuration is kept, instead of vLLM's registry."""

    def __init__(self) -> None:
        self.value: dict[str, Any] | None = None
        self.published = 0

    def publish(self, config: GlassboxConfig) -> None:
        self.value = config.model_dump()
        self.published += 1

    def read(self) -> dict[str, Any] | None:
        return self.value


@pytest.fixture
def registry() -> FakeRegistry:
    return FakeRegistry()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "glassbox.yaml"
    write(file, sample_rate=0.5)
    return file


def write(path: Path, **content: Any) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(yaml.safe_dump(content))
    fresh.replace(path)


def make(path: Path, registry: FakeRegistry, **content: Any) -> Settings:
    config = GlassboxConfig.model_validate(content or {"sample_rate": 0.5})
    return Settings(path, config, publish=registry.publish, read=registry.read)


@pytest.fixture
def watched(path: Path, registry: FakeRegistry) -> Iterator[Settings]:
    settings = make(path, registry)
    settings.watch()
    yield settings
    settings.close()


@pytest.fixture
def log() -> Iterator[list[str]]:
    """`LEVEL message` of all that settings log."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    logger = logging.getLogger("glassbox.config.settings")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
    logging.getLogger("glassbox").setLevel(logging.INFO)


class TestConfig:
    def test_published_at_once(self, path: Path, registry: FakeRegistry) -> None:
        """What was loaded is in the registry as soon as there are settings, as plain values."""
        settings = make(path, registry, sample_rate=0.25, sampling={"layers": [3, 1]})
        assert registry.value is not None
        assert registry.value["sample_rate"] == 0.25
        assert registry.value["sampling"]["layers"] == [1, 3]
        assert settings.config == settings.started_with

    def test_read_from_the_registry_only(self, path: Path, registry: FakeRegistry) -> None:
        """Whoever registers another configuration is obeyed."""
        settings = make(path, registry)
        registry.value = {"sample_rate": 0.75}
        assert settings.config.sample_rate == 0.75

    def test_parsed_once(self, path: Path, registry: FakeRegistry) -> None:
        """The same object as long as the registry's is the same: the step hook compares by identity."""
        settings = make(path, registry)
        first = settings.config
        assert settings.config is first
        registry.publish(first)
        assert settings.config is not first
        assert settings.config == first

    def test_cleared_registry(self, path: Path, registry: FakeRegistry) -> None:
        """If somebody clears it, what was in force stays."""
        settings = make(path, registry, sample_rate=0.25)
        registry.value = None
        assert settings.config.sample_rate == 0.25

    def test_log_level(self, path: Path, registry: FakeRegistry, log: list[str]) -> None:
        """It is set for glassbox's loggers."""
        make(path, registry, log_level="error")
        assert logging.getLogger("glassbox").level == logging.ERROR


class TestStatus:
    def test_before_watching(self, path: Path, registry: FakeRegistry) -> None:
        """Loading succeeded, now."""
        before = time.time()
        status = make(path, registry).status
        assert status.successful
        assert before <= status.timestamp_s <= time.time()
        assert status.error is None

    def test_no_thread_before_watching(self, path: Path, registry: FakeRegistry) -> None:
        """Making settings starts nothing, and closing them then is fine."""
        before = set(threading.enumerate())
        settings = make(path, registry)
        settings.close()
        assert not set(threading.enumerate()) - before


class TestWatch:
    def wait(self, read: Callable[[], object]) -> None:
        wait_for(read, what="the edit to take effect", pause_s=0.02)

    def test_edit(self, watched: Settings, path: Path, log: list[str]) -> None:
        """A good edit is published, set and logged in one line."""
        write(path, sample_rate=1, log_level="debug")
        self.wait(lambda: watched.config.sample_rate == 1)
        self.wait(lambda: log)
        assert log == [f"INFO Reloaded {path}: log_level info -> debug, sample_rate 0.5 -> 1.0"]
        assert logging.getLogger("glassbox").level == logging.DEBUG
        assert watched.started_with.sample_rate == 0.5

    def test_bad_edit(self, watched: Settings, path: Path, log: list[str]) -> None:
        """The last good configuration stays; the status and one line of the log tell why."""
        write(path, sample_rate=3)
        self.wait(lambda: not watched.status.successful)
        self.wait(lambda: log)
        problem = f"{path}: sample_rate must be between 0 and 1, got 3; use 0 to stop sampling"
        assert log == [f"ERROR {problem}. The last good configuration stays in force."]
        assert watched.status.error == problem
        assert watched.config.sample_rate == 0.5

    def test_mended_as_it_was(self, watched: Settings, path: Path, log: list[str]) -> None:
        """A file that is good again is told to subscribers though the configuration is the same."""
        told: list[bool] = []
        watched.subscribe(lambda: told.append(watched.status.successful))
        write(path, sample_rate=3)
        self.wait(lambda: told == [False])
        write(path, sample_rate=0.5)
        self.wait(lambda: told == [False, True])
        assert log[-1] == f"INFO {path} is good again and says what is in force"

    def test_subscribers(self, watched: Settings, path: Path) -> None:
        """They are called after the configuration has changed, until they are taken off."""
        seen: list[float] = []
        undo = watched.subscribe(lambda: seen.append(watched.config.sample_rate))
        write(path, sample_rate=1)
        self.wait(lambda: seen)
        undo()
        write(path, sample_rate=0.125)
        self.wait(lambda: watched.config.sample_rate == 0.125)
        assert seen == [1]

    def test_what_needs_a_restart(self, watched: Settings, path: Path, log: list[str]) -> None:
        """It is named in a warning; the rest of the edit is live."""
        write(path, sample_rate=1, attach="custom")
        self.wait(lambda: len(log) == 2)
        assert log[1] == (
            "WARNING glassbox.yaml: attach changed from auto to custom, which takes effect after a restart of vllm "
            "serve; until then auto stays in use"
        )
        assert watched.config.sample_rate == 1

    def test_edit_before_watching(self, path: Path, registry: FakeRegistry) -> None:
        """What was written between loading and watching is not missed."""
        settings = make(path, registry)
        write(path, sample_rate=1)
        settings.watch()
        try:
            assert settings.config.sample_rate == 1
        finally:
            settings.close()

    def test_twice(self, watched: Settings, path: Path, log: list[str]) -> None:
        """Watching twice is watching once."""
        watched.watch()
        write(path, sample_rate=1)
        self.wait(lambda: log)
        time.sleep(0.8)  # more than the watcher's look
        assert len(log) == 1

    def test_closed(self, watched: Settings, path: Path, registry: FakeRegistry) -> None:
        """After closing nothing is followed and no thread is left; the configuration stays."""
        watched.close()
        # Closing waits for a second at most.
        self.wait(lambda: not [thread for thread in threading.enumerate() if thread.name == "glassbox-config-watcher"])
        published = registry.published
        write(path, sample_rate=1)
        time.sleep(0.8)
        assert registry.published == published
        assert watched.config.sample_rate == 0.5

    def test_failing_subscriber(self, watched: Settings, path: Path) -> None:
        """A subscriber that raises does not end the watching."""

        def fail() -> None:
            raise RuntimeError("no")

        undo = watched.subscribe(fail)
        write(path, sample_rate=1)
        self.wait(lambda: watched.config.sample_rate == 1)
        undo()
        write(path, sample_rate=0.25)
        self.wait(lambda: watched.config.sample_rate == 0.25)
