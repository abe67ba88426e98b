"""Clients that keep a server busy as long as it is watched. Owns how requests are repeated, not what is asked."""

import threading
from collections.abc import Sequence

from glassbox.cli.demo.questions import AT_ONCE
from glassbox.cli.demo.traffic import Request, send_traffic


class Clients:
    """Clients that send requests again and again until the block ends, each its own share, without a pause.

    Nobody waits for the slowest of a batch, so that a slow machine's windows too have the rows that the rules ask for.

    Args:
        url, model: of the server.
        requests: at least as many as there are clients.

    Attributes:
        error: what ended one before its time.
    """

    def __init__(self, url: str, model: str, requests: Sequence[Request]) -> None:
        self._url, self._model = url, model
        self._ended = threading.Event()
        shares = [requests[i::AT_ONCE] for i in range(AT_ONCE)]
        self._rounds = [0] * len(shares)
        self._threads = [
            threading.Thread(target=self._run, args=(i, share), name=f"client {i}") for i, share in enumerate(shares)
        ]
        self.error: Exception | None = None

    @property
    def rounds(self) -> int:
        """How often all of them were answered."""
        return min(self._rounds)

    def _run(self, i: int, share: Sequence[Request]) -> None:
        try:
            while not self._ended.is_set():
                for request in share:
                    send_traffic(self._url, self._model, [[request]])
                    if self._ended.is_set():
                        return
                self._rounds[i] += 1
        except Exception as error:  # raised again by who waits
            self.error = error

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
