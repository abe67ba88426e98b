"""What the exporter says about itself is there as it was said, also on a full disk."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from glassbox.store.exporter_status import STATUS_NAME, ExporterStatus, read_status, write_status
from tests.serving import require_tool

STATUS = ExporterStatus(4711, 12.5, {"otel": 3}, {"otel": 0.0, "jsonl": 11.25}, restarts=2, ended=True)


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Each field."""
    write_status(tmp_path, STATUS)
    assert read_status(tmp_path) == STATUS


@pytest.mark.parametrize("text", ["", "[]", "{", '{"pid": 1}', '{"pid": 1, "time_s": "x", "errors": {}, "sinks": []}'])
def test_what_is_none_is_none(tmp_path: Path, text: str) -> None:
    """A file that was half written, or is of another version."""
    (tmp_path / STATUS_NAME).write_text(text)
    assert read_status(tmp_path) is None


class TestFullDisk:
    @pytest.fixture
    def disk(self, tmp_path: Path) -> Iterator[Path]:
        mount, umount = require_tool("mount", "mount"), require_tool("umount", "mount")
        command = [mount, "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", str(tmp_path)]
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        if mounted.returncode:
            pytest.skip(f"a full disk needs the right to mount one: {mounted.stderr.strip()}")
        yield tmp_path
        subprocess.run([umount, "-l", str(tmp_path)], check=True)

    def fill(self, disk: Path) -> None:
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def test_the_older_one_is_overwritten(self, disk: Path) -> None:
        """By a shorter and by a longer one: what sinks do meanwhile is told."""
        write_status(disk, STATUS)
        self.fill(disk)
        shorter = ExporterStatus(1, 13.0, {})
        longer = ExporterStatus(1, 14.0, {f"stage{n}": n for n in range(40)}, {"otel": 14.0})
        for status in (shorter, longer, STATUS):
            write_status(disk, status)
            assert read_status(disk) == status
        assert sorted(path.name for path in disk.iterdir()) == [STATUS_NAME, "filler"]

    def test_a_first_one_finds_no_room(self, disk: Path) -> None:
        """That is an error, as ever."""
        self.fill(disk)
        with pytest.raises(OSError, match="No space left"):
            write_status(disk, STATUS)
