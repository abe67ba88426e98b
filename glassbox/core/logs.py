"""glassbox's loggers: in vLLM's format and at vLLM's destination, with a level of their own.

Owns the logger "glassbox". It never touches vLLM's loggers, and doesn't import vLLM: the exporter runs
without it, and has its worker log for it (`processes/exporter/log_relay.py`).
"""

import copy
import logging
import sys
from typing import Final

from glassbox.core.printable import printable

ROOT: Final = "glassbox"
_VLLM: Final = "vllm"
_FORMAT: Final = "(%(processName)s pid=%(process)d) %(levelname)s %(asctime)s [%(filename)s:%(lineno)d] %(message)s"
_DATE_FORMAT: Final = "%m-%d %H:%M:%S"
_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
# On the logger, not in this module: it lives as long as what it is about.
_ONCE_ATTRIBUTE: Final = "_glassbox_logged_once"


def plain_handler() -> logging.Handler:
    """To stderr, in a format like vLLM's."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT, _DATE_FORMAT))
    return handler


def on_one_line(record: logging.LogRecord) -> logging.LogRecord:
    r"""The record, with what is no character to be seen in its message as `\n` or `\x1b`.

    Ids, names of models and errors come from clients: none may end a line and begin one of its own, or give a terminal
    orders.
    """
    message = record.getMessage()
    shown = printable(message)
    if shown == message:
        return record
    record = copy.copy(record)
    record.msg, record.args = shown, ()
    return record


class _ForwardingHandler(logging.Handler):
    """Gives records to the handlers that vLLM's logger has at that moment.

    If it has none, to the root logger's; if there is none either, to stderr.

    vLLM configures its logging again after plugins are loaded (`--log-level`, JSON, a user's logging config),
    so a copy of its handler would soon be stale. The handlers' own level is passed by, since it holds vLLM's
    level (VLLM_LOGGING_LEVEL), and glassbox's is `log_level`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fallback = plain_handler()

    def emit(self, record: logging.LogRecord) -> None:
        # Where vLLM was told to leave logging alone it has no handler, and the user's are on the root logger.
        handlers = logging.getLogger(_VLLM).handlers or logging.getLogger().handlers or [self._fallback]
        record = on_one_line(record)
        for handler in handlers:
            handler.handle(record)


def get_logger(name: str = ROOT) -> logging.Logger:
    """The logger `name`, at or below "glassbox".

    Handlers that a user's logging config has put on "glassbox" stay the only ones.

    Args:
        name: `__name__` of a glassbox module, or any other name, which is put below "glassbox".
    """
    root = logging.getLogger(ROOT)
    if not root.handlers:
        root.addHandler(_ForwardingHandler())
        root.propagate = False
        if root.level == logging.NOTSET:
            root.setLevel(logging.INFO)
    return logging.getLogger(name if name == ROOT or name.startswith(f"{ROOT}.") else f"{ROOT}.{name}")


def set_level(level: str) -> None:
    """Set the least severe level that glassbox logs; all other loggers keep theirs.

    Raises:
        ValueError: not one of debug, info, warning, error.
    """
    if level not in _LEVELS:
        raise ValueError(f"log_level must be one of {', '.join(_LEVELS)}, got {level!r}; use info if in doubt")
    get_logger().setLevel(_LEVELS[level])


def log_once(logger: logging.Logger, level: int, key: str, message: str, *args: object) -> bool:
    """Log `message` unless `logger` has logged something under `key` before in this process.

    A message that the level holds back does not count as logged.

    Returns:
        True if it was logged.
    """
    if not logger.isEnabledFor(level):
        return False
    logged: set[str] = logger.__dict__.setdefault(_ONCE_ATTRIBUTE, set())
    if key in logged:
        return False
    logged.add(key)
    logger.log(level, message, *args, stacklevel=2)
    return True
