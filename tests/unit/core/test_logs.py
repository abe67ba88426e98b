"""glassbox's loggers, beside a vLLM-like logger set up in a process of its own."""

import logging
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Iterator

import pytest

from glassbox.core.logs import get_logger, log_once, set_level


def run(code: str) -> tuple[str, str]:
    """Standard output and error of `code` in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


VLLM_LOGGING = """
import logging, logging.config, sys
logging.config.dictConfig({
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"vllm": {"format": "VLLM %(levelname)s [%(filename)s] %(message)s"}},
    "handlers": {"vllm": {
        "class": "logging.StreamHandler", "formatter": "vllm", "level": "INFO", "stream": "ext://sys.stdout"}},
    "loggers": {"vllm": {"handlers": ["vllm"], "level": "INFO", "propagate": False}},
})
"""


class TestFormat:
    def test_alone(self) -> None:
        """Without vLLM, messages go to stderr in a like format, info and above."""
        out, err = run("""
            from glassbox.core.logs import get_logger
            get_logger("glassbox.step").info("seen")
            get_logger("glassbox.step").debug("unseen")
        """)
        assert out == ""
        assert len(err.splitlines()) == 1
        assert "INFO" in err
        assert err.endswith("[<string>:3] seen\n")

    def test_beside_vllm(self) -> None:
        """With vLLM's logging they come out of its handler once, in its format."""
        out, err = run(
            VLLM_LOGGING + 'from glassbox.core.logs import get_logger\nget_logger("glassbox.step").warning("once")'
        )
        assert (out, err) == ("VLLM WARNING [<string>] once\n", "")

    @pytest.mark.parametrize("beside", ["", VLLM_LOGGING])
    def test_what_clients_choose(self, beside: str) -> None:
        """Ids and names end no line and give a terminal no orders, wherever they stand; what else is said stays."""
        out, err = run(
            beside
            + textwrap.dedent(r"""
            from glassbox.core.logs import get_logger
            get_logger("glassbox.step").warning("Rule r: request %s has ü", "cmpl-1\nERROR forged\x1b[2J\u202e")
            """)
        )
        assert (out + err).endswith("Rule r: request cmpl-1\\nERROR forged\\x1b[2J\\u202e has ü\n")
        assert 1 == len((out + err).splitlines())

    def test_vllm_configured_later(self) -> None:
        """vLLM may configure its logging after glassbox has its loggers."""
        out, err = run(
            'from glassbox.core.logs import get_logger\nlogger = get_logger("glassbox")\n'
            + VLLM_LOGGING
            + 'logger.info("later")'
        )
        assert (out, err) == ("VLLM INFO [<string>] later\n", "")

    def test_vllm_left_alone(self) -> None:
        """Where the user configures the root logger instead, its handlers are used."""
        out, err = run("""
            import logging, sys
            logging.basicConfig(stream=sys.stdout, format="ROOT %(message)s")
            from glassbox.core.logs import get_logger
            get_logger("glassbox").info("here")
        """)
        assert (out, err) == ("ROOT here\n", "")

    def test_users_own_handler(self) -> None:
        """A handler that the user has put on "glassbox" is the only one."""
        out, err = run(
            VLLM_LOGGING
            + """
handler = logging.StreamHandler(sys.stdout)
handler.setFormatter(logging.Formatter("MINE %(message)s"))
logging.getLogger("glassbox").addHandler(handler)
logging.getLogger("glassbox").propagate = False
from glassbox.core.logs import get_logger
get_logger("glassbox.step").warning("hello")
"""
        )
        assert (out, err) == ("MINE hello\n", "")


class TestLevel:
    def test_only_glassbox(self) -> None:
        """Debug for glassbox comes through vLLM's info handler, and vLLM itself stays at info."""
        out, _ = run(
            VLLM_LOGGING
            + """
from glassbox.core.logs import get_logger, set_level
set_level("debug")
get_logger("glassbox.step").debug("ours")
logging.getLogger("vllm.x").debug("theirs")
set_level("error")
get_logger("glassbox.step").warning("held back")
logging.getLogger("vllm.x").info("vllm's")
"""
        )
        assert out == "VLLM DEBUG [<string>] ours\nVLLM INFO [<string>] vllm's\n"

    def test_wrong_level(self) -> None:
        """An unknown level is refused with the known ones."""
        with pytest.raises(ValueError, match="log_level must be one of debug, info, warning, error, got 'loud'"):
            set_level("loud")


class Recorder(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def recorded() -> Iterator[tuple[logging.Logger, Recorder]]:
    logger = get_logger(f"test-{uuid.uuid4()}")
    recorder = Recorder()
    logger.addHandler(recorder)
    logger.propagate = False
    yield logger, recorder
    logger.removeHandler(recorder)


class TestGetLogger:
    def test_names(self) -> None:
        """Every logger is at or below "glassbox", which does not propagate."""
        assert get_logger("glassbox.step").name == "glassbox.step"
        assert get_logger("other").name == "glassbox.other"
        assert get_logger("glassboxes").name == "glassbox.glassboxes"
        assert get_logger() is logging.getLogger("glassbox")
        assert not get_logger().propagate

    def test_one_handler(self) -> None:
        """Asking again adds no handler."""
        before = list(get_logger().handlers)
        for _ in range(3):
            get_logger("glassbox.step")
        assert get_logger().handlers == before
        assert get_logger("glassbox.step").handlers == []


class TestLogOnce:
    def test_once_per_key(self, recorded: tuple[logging.Logger, Recorder]) -> None:
        """A key is logged the first time only, with the caller's line."""
        logger, recorder = recorded
        told = [log_once(logger, logging.ERROR, key, "stage %s", key) for key in ("a", "a", "b")]
        assert told == [True, False, True]
        assert [record.getMessage() for record in recorder.records] == ["stage a", "stage b"]
        assert {record.filename for record in recorder.records} == {"test_logs.py"}

    def test_held_back(self, recorded: tuple[logging.Logger, Recorder]) -> None:
        """A message below the level does not use up its key."""
        logger, recorder = recorded
        logger.setLevel(logging.ERROR)
        assert not log_once(logger, logging.INFO, "a", "x")
        logger.setLevel(logging.INFO)
        assert log_once(logger, logging.INFO, "a", "x")
        assert len(recorder.records) == 1
