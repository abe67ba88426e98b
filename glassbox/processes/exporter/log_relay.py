"""The exporter's log, told by the worker that started it: in whatever format and place vLLM's logging was given.

Owns both ends of the socket between them. The exporter can't set vLLM's logging up itself: it may come from variables,
arguments or a file with classes of the user's, and to import vLLM takes seconds. So it sends its records, and the
worker, where all that is in force, handles them as its own.
"""

import contextlib
import json
import logging
import socket
import threading
from typing import Any, Final

from glassbox.core.affinity import leave_workers_cores
from glassbox.core.logs import get_logger, on_one_line, plain_handler

PROCESS_NAME: Final = "glassbox-exporter"
# Of a message, and again of a traceback.
_MAX_CHARS: Final = 4_000
# A record must be one message of the socket, which cuts what is longer: in JSON a character may take twelve bytes.
_MAX_BYTES: Final = 131_072
_TOLD: Final = (
    "name",
    "levelno",
    "levelname",
    "pathname",
    "filename",
    "module",
    "lineno",
    "funcName",
    "created",
    "msecs",
)


class _Sender(logging.Handler):
    """Sends records to the worker; never waits. What it can't get rid of goes to stderr."""

    def __init__(self, to: socket.socket) -> None:
        super().__init__()
        self._socket = to
        self._fallback = plain_handler()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            record = on_one_line(record)
            told: dict[str, Any] = {name: getattr(record, name) for name in _TOLD}
            told |= {"message": record.getMessage()[:_MAX_CHARS], "process": record.process, "exc_text": None}
            if record.exc_info:
                told["exc_text"] = logging.Formatter().formatException(record.exc_info)[-_MAX_CHARS:]
            self._socket.send(json.dumps(told).encode())
        except Exception:  # the worker is gone, or stopped and its end is full
            self._fallback.handle(record)


def send_logs(handle: int) -> None:
    """Send what this process logs, its packages' warnings included, to the other end of a socket.

    Args:
        handle: file descriptor of this end, which now belongs to the log.
    """
    to = socket.socket(fileno=handle)
    to.setblocking(False)
    sender = _Sender(to)
    get_logger().handlers[:] = [sender]
    logging.getLogger().addHandler(sender)


def open_relay() -> socket.socket:
    """Handle the records of an exporter that is about to be started, in a thread that ends with it.

    Returns:
        The exporter's end, to be closed here once it has it.
    """
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.set_inheritable(True)
    threading.Thread(target=_relay, args=(mine,), name="glassbox-exporter-log", daemon=True).start()
    return theirs


def _relay(mine: socket.socket) -> None:
    leave_workers_cores(0)
    with mine, contextlib.suppress(OSError):
        while data := mine.recv(_MAX_BYTES):
            with contextlib.suppress(ValueError, TypeError, KeyError):
                told = json.loads(data)
                record = logging.makeLogRecord(
                    {
                        **{name: told[name] for name in _TOLD},
                        "msg": "%s",
                        "args": (told["message"],),
                        "process": told["process"],
                        "processName": PROCESS_NAME,
                        "vllm_process_name": PROCESS_NAME,  # of vLLM's own format
                        "exc_text": told["exc_text"],
                    }
                )
                # Its level was the exporter's to look at, which follows the same file.
                get_logger(record.name).handle(record)
