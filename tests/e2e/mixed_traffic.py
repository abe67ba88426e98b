"""Mixed traffic for the end-to-end tests: what a server of many users sees, until told to stop.

Chat and completion, short and long, streamed and whole, several at once, and clients that go away in the middle.
"""

import itertools
import threading
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

import httpx

from tests.serving import MODEL_NAME

TIMEOUT_S: Final = 120.0
_SUBJECTS: Final = ("a harbour", "the tides", "an old clock", "bread", "a violin", "winter", "a map", "glass")


class MixedTraffic:
    """Sends requests to a server from several threads as long as the `with` block lasts.

    Attributes:
        answered: finished requests by kind.
        failures: what went wrong, a text each; a client that left on purpose is none.
    """

    def __init__(self, url: str, threads: int = 3) -> None:
        self.answered: Counter[str] = Counter()
        self.failures: list[str] = []
        self._url = url
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(number,), name=f"traffic-{number}") for number in range(threads)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def total(self) -> int:
        """Finished requests of all kinds, those that were broken off included."""
        with self._lock:
            return sum(self.answered.values())

    def _run(self, number: int) -> None:
        kinds: tuple[tuple[str, Callable[[httpx.Client, str], None]], ...] = (
            ("chat", self._chat),
            ("streamed", self._streamed),
            ("completion", self._completion),
            ("aborted", self._aborted),
            ("long", self._long),
        )
        with httpx.Client(base_url=self._url, timeout=TIMEOUT_S) as client:
            # Threads begin at different kinds, so that kinds meet each other in a batch.
            for turn in itertools.count(2 * number):
                if self._stop.is_set():
                    return
                name, send = kinds[turn % len(kinds)]
                try:
                    send(client, f"{_SUBJECTS[turn % len(_SUBJECTS)]}, part {turn}")
                except Exception as error:  # kept for the test, which names it in its message
                    with self._lock:
                        self.failures.append(f"{name}: {type(error).__name__}: {error}")
                    self._stop.wait(1.0)
                else:
                    with self._lock:
                        self.answered[name] += 1

    @staticmethod
    def _post(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
        return dict(client.post(path, json={"model": MODEL_NAME, **body}).raise_for_status().json())

    def _chat(self, client: httpx.Client, subject: str) -> None:
        messages = [{"role": "user", "content": f"Tell me about {subject}."}]
        answer = self._post(client, "/v1/chat/completions", messages=messages, max_tokens=12)
        if answer["choices"][0]["message"]["content"] is None:
            raise ValueError("an answer without text")

    def _completion(self, client: httpx.Client, subject: str) -> None:
        self._post(client, "/v1/completions", prompt=f"Once there was {subject}", max_tokens=10, n=2, temperature=0.7)

    def _long(self, client: httpx.Client, subject: str) -> None:
        self._post(client, "/v1/completions", prompt=f"A long story about {subject}. " * 50, max_tokens=6)

    def _streamed(self, client: httpx.Client, subject: str) -> None:
        body = {"model": MODEL_NAME, "prompt": f"Of {subject} it is said", "max_tokens": 12, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as reply:
            reply.raise_for_status()
            lines = [line for line in reply.iter_lines() if line]
        if lines[-1] != "data: [DONE]":
            raise ValueError(f"a stream must end with [DONE], got {lines[-1]!r}")

    def _aborted(self, client: httpx.Client, subject: str) -> None:
        """The client leaves after the third token of many."""
        body = {"model": MODEL_NAME, "prompt": f"All of {subject}:", "max_tokens": 800, "stream": True}
        body |= {"ignore_eos": True}
        with client.stream("POST", "/v1/completions", json=body) as reply:
            reply.raise_for_status()
            for _ in zip(range(3), reply.iter_lines(), strict=False):
                pass
