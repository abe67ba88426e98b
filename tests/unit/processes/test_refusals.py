"""Refusals for answers that wait: told soon, to this user's processes alone, and however many there are, cheaply."""

from pathlib import Path

import pytest

from glassbox.processes.worker.traces.refusals import PAUSE_S, RefusalNotes
from glassbox.store.file_names import request_digest
from glassbox.store.trace_refusals import MAX_REFUSALS, MAX_WHY, Refusal, RefusalReader
from tests.trace_samples import make_host


class Notes(RefusalNotes):
    """Of a worker whose time a test moves."""

    def __init__(self, run_dir: Path) -> None:
        self.now_s = 100.0
        super().__init__(run_dir, make_host(engine="a/b"), lambda: self.now_s)


def refusal(number: int, why: str = "no") -> Refusal:
    return Refusal(request_digest(f"cmpl-{number}", None), why, float(number))


def read(run_dir: Path) -> list[Refusal]:
    (worker,) = RefusalReader(run_dir).read()
    assert ("a/b", "i0") == (worker.engine, worker.instance)
    return list(worker.refusals.values())


class TestRefusalNotes:
    def test_at_once_and_then_now_and_then(self, tmp_path: Path) -> None:
        """What comes while a file was just written waits for the next one."""
        notes = Notes(tmp_path)
        notes.write()
        assert [] == list(tmp_path.iterdir())
        notes.add(refusal(1))
        assert notes.wait
        notes.write()
        assert ([refusal(1)], False) == (read(tmp_path), notes.wait)
        notes.add(refusal(2))
        notes.write()
        assert ([refusal(1)], True) == (read(tmp_path), notes.wait)
        notes.now_s += PAUSE_S
        notes.write()
        assert ([refusal(1), refusal(2)], False) == (read(tmp_path), notes.wait)

    def test_bounded_and_private(self, tmp_path: Path) -> None:
        """The newest ones, with reasons that are cut; no id stands in the file."""
        notes = Notes(tmp_path)
        for number in range(3 * MAX_REFUSALS):
            notes.add(refusal(number, "\x00" * 5000))
        notes.write()
        found = read(tmp_path)
        assert [refusal(n, "\x00" * MAX_WHY) for n in range(2 * MAX_REFUSALS, 3 * MAX_REFUSALS)] == found
        (file,) = tmp_path.iterdir()
        assert "refused-a_b-0.json" == file.name
        assert 0o600 == file.stat().st_mode & 0o777
        assert b"cmpl" not in file.read_bytes()

    def test_a_disk_that_is_full(self, tmp_path: Path) -> None:
        """They are told later."""
        notes = Notes(tmp_path / "gone")
        notes.add(refusal(1))
        with pytest.raises(FileNotFoundError):
            notes.write()
        (tmp_path / "gone").mkdir()
        notes.now_s += PAUSE_S
        notes.write()
        assert [refusal(1)] == read(tmp_path / "gone")
