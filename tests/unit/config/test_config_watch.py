"""Following the file: with real files, real events and a real thread."""

import itertools
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from glassbox.config import follow
from glassbox.config.load import ConfigError, GlassboxConfig, load_config, packaged_config
from glassbox.config.watch import ConfigWatcher
from tests.waiting import require_within, seconds_of, wait_for

# What the design promises of an edit.
EFFECT_S = 2.0
THREAD = "glassbox-config-watcher"


def wait_until(condition: Callable[[], bool]) -> None:
    wait_for(condition, what="the edit to be seen", pause_s=0.01)


def watching() -> int:
    """How many watchers' threads run."""
    return sum(thread.name == THREAD for thread in threading.enumerate())


class Followed:
    """A watcher with what it has told."""

    def __init__(self, path: Path, initial: GlassboxConfig | None = None) -> None:
        self.rates: list[float] = []
        self.errors: list[str] = []
        self.raises: Exception | None = None
        self.watcher = ConfigWatcher(path, self._on_change, self._on_error, initial=initial)

    def _on_change(self, config: GlassboxConfig) -> None:
        self.rates.append(config.sample_rate)
        if self.raises is not None:
            raise self.raises

    def _on_error(self, error: ConfigError) -> None:
        self.errors.append(str(error))

    def wait_rate(self, rate: float) -> None:
        wait_until(lambda: self.rates[-1:] == [rate])


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "etc" / "glassbox.yaml"
    path.parent.mkdir()
    path.write_text("sample_rate: 0.1")
    return path


@pytest.fixture
def followed(config_file: Path) -> Iterator[Followed]:
    followed = Followed(config_file)
    followed.watcher.start()
    yield followed
    followed.watcher.stop()


class TestGoodEdits:
    def test_write(self, config_file: Path, followed: Followed) -> None:
        """An edit in place is told within two seconds; what stood there at the start is not."""
        rates = (number / 100 for number in itertools.count(20))

        def edit() -> None:
            rate = next(rates)
            config_file.write_text(f"sample_rate: {rate}")
            followed.wait_rate(rate)

        require_within(EFFECT_S, lambda: seconds_of(edit))
        assert followed.rates == [number / 100 for number in range(20, 20 + len(followed.rates))]
        assert followed.watcher.current == load_config(config_file)

    def test_replace(self, config_file: Path, followed: Followed) -> None:
        """A replacement by rename is told, more than once."""
        for rate in (0.2, 0.3):
            new = config_file.with_name("glassbox.yaml.swp")
            new.write_text(f"sample_rate: {rate}")
            new.replace(config_file)
            followed.wait_rate(rate)

    def test_same_meaning(self, config_file: Path, followed: Followed) -> None:
        """An edit of a comment is not told."""
        config_file.write_text("sample_rate: 0.1  # a tenth")
        time.sleep(0.8)
        config_file.write_text("sample_rate: 0.2")
        followed.wait_rate(0.2)
        assert (followed.rates, followed.errors) == ([0.2], [])

    def test_delete_and_create(self, config_file: Path, followed: Followed) -> None:
        """A deleted file keeps the last good configuration and is told once; coming back it is followed."""
        config_file.unlink()
        wait_until(lambda: not followed.watcher.status.successful)
        assert followed.watcher.current is not None
        assert followed.watcher.current.sample_rate == 0.1
        config_file.write_text("sample_rate: 0.2")
        followed.wait_rate(0.2)
        assert len(followed.errors) == 1
        assert followed.watcher.status.successful

    def test_directory_vanishes(self, config_file: Path, followed: Followed) -> None:
        """The directory may be removed and made again; edits after that are seen."""
        shutil.rmtree(config_file.parent)
        wait_until(lambda: not followed.watcher.status.successful)
        config_file.parent.mkdir()
        for rate in (0.2, 0.3):
            config_file.write_text(f"sample_rate: {rate}")
            followed.wait_rate(rate)

    def test_config_map(self, tmp_path: Path) -> None:
        """A Kubernetes volume, where `..data` is swapped beside the file, is followed."""
        for version, rate in (("v1", 0.1), ("v2", 0.2), ("v3", 0.3)):
            (tmp_path / version).mkdir()
            (tmp_path / version / "glassbox.yaml").write_text(f"sample_rate: {rate}")
        (tmp_path / "..data").symlink_to("v1")
        path = tmp_path / "glassbox.yaml"
        path.symlink_to("..data/glassbox.yaml")
        followed = Followed(path)
        followed.watcher.start()
        try:
            for version, rate in (("v2", 0.2), ("v3", 0.3)):
                (tmp_path / "..data_tmp").symlink_to(version)
                (tmp_path / "..data_tmp").rename(tmp_path / "..data")
                followed.wait_rate(rate)
        finally:
            followed.watcher.stop()

    def test_link_into_other_directory(self, tmp_path: Path, config_file: Path) -> None:
        """A symlink's target is followed though its directory is not watched."""
        link = tmp_path / "glassbox.yaml"
        link.symlink_to(config_file)
        followed = Followed(link)
        followed.watcher.start()
        try:
            config_file.write_text("sample_rate: 0.25")
            followed.wait_rate(0.25)
        finally:
            followed.watcher.stop()

    def test_edit_before_start(self, config_file: Path) -> None:
        """With what was loaded before, an edit between loading and start is told."""
        followed = Followed(config_file, initial=load_config(config_file))
        config_file.write_text("sample_rate: 0.2")
        followed.watcher.start()
        followed.watcher.stop()
        assert followed.rates == [0.2]

    def test_without_events(self, config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the kernel gives no events, the file is looked at instead."""
        monkeypatch.setenv("WATCHFILES_FORCE_POLLING", "1")
        followed = Followed(config_file)
        followed.watcher.start()
        try:
            config_file.write_text("sample_rate: 0.2")
            followed.wait_rate(0.2)
        finally:
            followed.watcher.stop()

    def test_watching_fails(self, config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where watching can't be had at all, not even polling, edits are seen all the same."""

        def no_watch(*args: object, **kwargs: object) -> Iterator[set[tuple[int, str]]]:
            raise OSError("OS file watch limit reached")

        monkeypatch.setattr("watchfiles.watch", no_watch)
        followed = Followed(config_file)
        followed.watcher.start()
        try:
            config_file.write_text("sample_rate: 0.2")
            followed.wait_rate(0.2)
        finally:
            followed.watcher.stop()


class TestBadEdits:
    def test_told_once(self, config_file: Path, followed: Followed) -> None:
        """A bad edit is told once, saved again or not; the last good configuration stays."""
        config_file.write_text("sample_rate: 3")
        wait_until(lambda: len(followed.errors) == 1)
        os.utime(config_file)
        config_file.write_text("sample_rate: 3")
        time.sleep(0.8)
        assert followed.errors == [f"{config_file}: sample_rate must be between 0 and 1, got 3; use 0 to stop sampling"]
        assert followed.rates == []
        assert followed.watcher.current is not None
        assert followed.watcher.current.sample_rate == 0.1
        assert followed.watcher.status.error == followed.errors[0]

    def test_each_content(self, config_file: Path, followed: Followed) -> None:
        """Another bad content is another message, even if it is wrong in the same way."""
        config_file.write_text("sample_rate: 3")
        wait_until(lambda: len(followed.errors) == 1)
        config_file.write_text("sample_rate: 3 # still")
        wait_until(lambda: len(followed.errors) == 2)

    def test_back_to_good(self, config_file: Path, followed: Followed) -> None:
        """Taken back, a bad edit leaves a successful status, and no change is told."""
        before = followed.watcher.status
        config_file.write_text("sample_rate: 3")
        wait_until(lambda: not followed.watcher.status.successful)
        assert followed.watcher.status.timestamp_s == before.timestamp_s
        config_file.write_text("sample_rate: 0.1")
        wait_until(lambda: followed.watcher.status.successful)
        assert followed.watcher.status.timestamp_s > before.timestamp_s
        assert followed.watcher.status.error is None
        assert followed.rates == []

    def test_half_written(self, config_file: Path, followed: Followed, monkeypatch: pytest.MonkeyPatch) -> None:
        """A file that is bad for a moment while it is being written is no error."""
        monkeypatch.setattr(follow, "SETTLE_S", 2.0)  # the second writing is sure to be in time
        config_file.write_text("")
        time.sleep(0.05)
        config_file.write_text("sample_rate: 0.2")
        followed.wait_rate(0.2)
        assert followed.errors == []

    def test_bad_at_start(self, config_file: Path) -> None:
        """A file that is bad at the start is told at once; made good, it is the first configuration."""
        config_file.write_text("sample_rate: 3")
        followed = Followed(config_file)
        followed.watcher.start()
        try:
            assert len(followed.errors) == 1
            assert followed.watcher.current is None
            config_file.write_text("sample_rate: 0.2")
            followed.wait_rate(0.2)
            assert followed.watcher.status.successful
        finally:
            followed.watcher.stop()


class TestThread:
    def test_callback_raises(self, config_file: Path, followed: Followed) -> None:
        """An exception from a callback is shown in the status and ends nothing."""
        followed.raises = RuntimeError("no such device")
        config_file.write_text("sample_rate: 0.2")
        wait_until(lambda: not followed.watcher.status.successful)
        assert followed.watcher.status.error == (f"applying {config_file} failed: RuntimeError: no such device")
        followed.raises = None
        config_file.write_text("sample_rate: 0.3")
        followed.wait_rate(0.3)
        wait_until(lambda: followed.watcher.status.successful)

    def test_stop(self, config_file: Path) -> None:
        """stop ends the thread within a second, twice is as good as once, and start begins again."""
        followed = Followed(config_file)

        def start_and_stop() -> None:
            followed.watcher.start()
            followed.watcher.start()
            assert watching() == 1
            followed.watcher.stop()
            followed.watcher.stop()
            wait_until(lambda: watching() == 0)

        require_within(1.0, lambda: seconds_of(start_and_stop))
        config_file.write_text("sample_rate: 0.2")
        followed.watcher.start()
        assert followed.rates == [0.2]
        followed.watcher.stop()

    def test_packaged_file(self) -> None:
        """The packaged file can be watched, and watching does not touch it."""
        before = packaged_config().stat()
        followed = Followed(packaged_config())
        followed.watcher.start()
        followed.watcher.stop()
        assert (followed.errors, followed.watcher.current) == ([], GlassboxConfig())
        assert packaged_config().stat().st_mtime_ns == before.st_mtime_ns
