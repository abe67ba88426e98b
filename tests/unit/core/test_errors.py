"""Errors are counted by stage, the first of a stage is logged, and nothing escapes."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from glassbox.core.errors import ErrorCounter


class Recorder(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def messages(self, level: int) -> list[str]:
        return [record.getMessage() for record in self.records if record.levelno == level]


@pytest.fixture
def log() -> Iterator[Recorder]:
    recorder, logger = Recorder(), logging.getLogger("test.errors")
    logger.addHandler(recorder)
    logger.propagate = False
    logger.setLevel(logging.DEBUG)
    yield recorder
    logger.removeHandler(recorder)


@pytest.fixture
def errors(log: Recorder) -> ErrorCounter:
    return ErrorCounter(logging.getLogger("test.errors"))


class TestErrorCounter:
    def test_nothing_yet(self, errors: ErrorCounter) -> None:
        """No stage is known before its first error."""
        assert errors.counts() == {}

    def test_counts_by_stage(self, errors: ErrorCounter) -> None:
        """Each error counts, under its own stage."""
        for stage in ("observe", "snapshot", "observe"):
            errors.count(stage, ValueError("x"))
        assert errors.counts() == {"observe": 2, "snapshot": 1}

    def test_first_of_a_stage_is_logged(self, errors: ErrorCounter, log: Recorder) -> None:
        """One line names stage, exception and metric; what follows in that stage is only counted."""
        errors.count("observe", ValueError("bad value"))
        errors.count("observe", TypeError("another"))
        errors.count("snapshot", OSError("disk full"))
        assert log.messages(logging.ERROR) == [
            "observe failed: ValueError: bad value. Serving goes on; further errors of this stage are only counted "
            "(glassbox_errors_total{stage='observe'}).",
            "snapshot failed: OSError: disk full. Serving goes on; further errors of this stage are only counted "
            "(glassbox_errors_total{stage='snapshot'}).",
        ]

    def test_traceback_at_debug(self, errors: ErrorCounter, log: Recorder) -> None:
        """The traceback is for debugging: it comes at that level, and not in the line of the error."""
        with errors.guard("observe"):
            raise ValueError("bad value")
        by_level = {record.levelno: record for record in log.records}
        assert by_level[logging.ERROR].exc_info is None
        debug = by_level[logging.DEBUG].exc_info
        assert debug is not None
        assert debug[0] is ValueError
        assert debug[2] is not None

    def test_counts_are_a_copy(self, errors: ErrorCounter) -> None:
        """Who changes what `counts` gave changes nothing."""
        errors.count("observe", ValueError())
        errors.counts()["observe"] = 7
        assert errors.counts() == {"observe": 1}

    def test_from_many_threads(self, errors: ErrorCounter, log: Recorder) -> None:
        """No error is lost and none is logged twice."""
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: errors.count("observe", ValueError()), range(2000)))
        assert errors.counts() == {"observe": 2000}
        assert len(log.messages(logging.ERROR)) == 1


class TestGuard:
    def test_swallows_and_counts(self, errors: ErrorCounter) -> None:
        """An exception ends the block, and nothing else."""
        reached = []
        with errors.guard("arm"):
            reached.append("before")
            raise RuntimeError("no")
            reached.append("after")  # type: ignore[unreachable]
        assert reached == ["before"]
        assert errors.counts() == {"arm": 1}

    def test_without_an_error(self, errors: ErrorCounter) -> None:
        """Nothing is counted."""
        with errors.guard("arm"):
            pass
        assert errors.counts() == {}

    @pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
    def test_lets_the_end_of_the_process_through(self, errors: ErrorCounter, end: type[BaseException]) -> None:
        """Ctrl-C and exit are no errors of glassbox."""
        with pytest.raises(end), errors.guard("arm"):
            raise end
        assert errors.counts() == {}
