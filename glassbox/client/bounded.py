"""An answer within a time, whatever a server sends. httpx bounds the wait for each piece that comes, not for all.

Owns giving up: what is read is read by another thread, and whoever waits for it goes on when the time is over. That
thread ends with its connection, which is shut from here.
"""

import contextlib
import contextvars
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Final, TypeVar

_Read = TypeVar("_Read")
_OPENED: Final = ("connect_tcp.complete", "connect_unix_socket.complete", "start_tls.complete")


class Connection:
    """That of one request, known once it was opened for it: httpx's extension `trace`, which is told of each step."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._shut = False

    def __call__(self, step: str, about: Mapping[str, Any]) -> None:
        """A step was done."""
        if step.endswith(_OPENED):
            self.use(about["return_value"])

    def use(self, stream: Any) -> None:
        """This is it: a network stream of httpx's; None if what answers is no server."""
        with self._lock:
            self._socket = None if stream is None else stream.get_extra_info("socket")
            if self._shut:
                self._end()

    def shut(self) -> None:
        """End it, whoever reads from it; one that is just being opened is ended then."""
        with self._lock:
            self._shut = True
            self._end()

    def _end(self) -> None:
        # Shut, not closed: its number could be another file's before the reader looks again.
        if self._socket is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


def within(limit_s: float, read: Callable[[Connection], _Read]) -> _Read:
    """What `read` returns or raises.

    Args:
        limit_s: for all of it, however slowly its parts come.
        read: is called in another thread, in this one's context.

    Raises:
        TimeoutError: it had not returned by then.
    """
    connection, found = Connection(), Future[_Read]()

    def work() -> None:
        try:
            found.set_result(read(connection))
        except BaseException as error:  # raised where it is waited for
            found.set_exception(error)

    # A daemon: nothing that a server does may keep the program.
    target = contextvars.copy_context().run
    threading.Thread(target=target, args=(work,), name="glassbox-client", daemon=True).start()
    try:
        return found.result(limit_s)
    finally:
        if not found.done():  # an interrupt, too
            connection.shut()
