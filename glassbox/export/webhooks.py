"""Events posted to a URL, signed as Standard Webhooks says (https://www.standardwebhooks.com).

Owns the queue, the attempts and the signature: HMAC-SHA256 over id, time of the attempt and body, so that a receiver
can tell whose an event is, that it wasn't changed, and that it isn't an old one sent again. A sender has a thread and a
queue of its own, both bounded: an address that doesn't answer holds up no other, and nobody who offers it an event.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import httpx

from glassbox import __version__
from glassbox.config.webhook_secret import read_webhook_secret
from glassbox.core.secret_file import SecretFileError

MAX_WAITING: Final = 256
MAX_BODY_BYTES: Final = 1 << 16
ATTEMPT_S: Final = 5.0
# Of one event, from its first attempt on: what its receiver missed by then is no news.
PATIENCE_S: Final = 60.0
FIRST_BACKOFF_S: Final = 0.5
LONGEST_BACKOFF_S: Final = 16.0
_CLOSE_S: Final = 1.0
# What may pass by itself, beside all of 500 and above.
_TRY_AGAIN: Final = frozenset({408, 425, 429})

Outcome = Literal["done", "failed", "dropped"]


@dataclass(frozen=True)
class Event:
    """Something to be told.

    Attributes:
        id: the same in all attempts, by which a receiver knows one that it has had.
        body: JSON, of at most MAX_BODY_BYTES.
        told: is called, from the sender's thread, with what came of it and why.
    """

    id: str
    body: bytes
    told: Callable[[Outcome, str], None]


def signature(key: bytes, event_id: str, timestamp: int, body: bytes) -> str:
    """The header `webhook-signature`."""
    signed = f"{event_id}.{timestamp}.".encode() + body
    return f"v1,{base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()}"


class WebhookSender:
    """Posts events to one URL.

    Args:
        url: https, or http of this host.
        secret_file: is read for each attempt, so that a secret can be replaced.
        patience_s, first_backoff_s: see the constants.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        url: str,
        secret_file: Path,
        *,
        patience_s: float = PATIENCE_S,
        first_backoff_s: float = FIRST_BACKOFF_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._url, self._secret_file = url, secret_file
        self._patience_s, self._first_backoff_s, self._clock = patience_s, first_backoff_s, clock
        self._waiting: deque[Event] = deque()
        self._lock = threading.Lock()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake, self._ending = asyncio.Event(), asyncio.Event()

    @property
    def waiting(self) -> int:
        """Events in the queue."""
        return len(self._waiting)

    def offer(self, event: Event) -> bool:
        """Have an event sent; False if too many wait. Never waits."""
        with self._lock:
            if self._closing or len(self._waiting) >= MAX_WAITING:
                return False
            self._waiting.append(event)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="glassbox-webhooks", daemon=True)
                self._thread.start()
            self._tell_thread(self._wake)
        return True

    def _tell_thread(self, what: asyncio.Event) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(what.set)

    def close(self, timeout_s: float = _CLOSE_S) -> None:
        """Send what can be sent in that time; the rest is dropped, and told so."""
        with self._lock:
            self._closing = True
            self._tell_thread(self._wake)
            self._tell_thread(self._ending)
        if self._thread is not None:
            self._thread.join(timeout_s)
        with self._lock:
            left, self._waiting = list(self._waiting), deque()
        for event in left:
            event.told("dropped", "glassbox's exporter ended")

    def _run(self) -> None:
        asyncio.run(self._send_all())

    async def _send_all(self) -> None:
        self._loop = asyncio.get_running_loop()
        # No redirects: the operator has named who gets events. Nor is a proxy told what is for this host alone, and in
        # the clear. The bounds are of an attempt as a whole.
        by_proxy = not self._url.startswith("http:")
        async with httpx.AsyncClient(timeout=None, follow_redirects=False, trust_env=by_proxy) as client:
            while True:
                try:
                    event = self._waiting.popleft()
                except IndexError:
                    if self._closing:
                        return
                    await self._wake.wait()
                    self._wake.clear()
                    continue
                outcome, why = await self._deliver(client, event)
                event.told(outcome, why)

    async def _deliver(self, client: httpx.AsyncClient, event: Event) -> tuple[Outcome, str]:
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + self._patience_s
        backoff_s = self._first_backoff_s
        while True:
            again, why = await self._attempt(client, event)
            if not why:
                return "done", ""
            pause_s = backoff_s * random.uniform(0.5, 1.0)  # many servers whose receiver was down
            if not again or self._closing or loop.time() + pause_s >= give_up_s:
                return "failed", why
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), pause_s)
            backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)

    async def _attempt(self, client: httpx.AsyncClient, event: Event) -> tuple[bool, str]:
        """Whether to try again, and why it failed; empty if it didn't."""
        try:
            headers = self._headers(event)
            # A receiver that sends its answer a byte at a time would keep within httpx's own bounds for ever.
            async with asyncio.timeout(ATTEMPT_S):
                async with client.stream("POST", self._url, content=event.body, headers=headers) as answer:
                    status = answer.status_code
        except SecretFileError as error:
            return False, f"webhook.secret_file {error}"
        except TimeoutError:
            return True, f"no answer within {ATTEMPT_S:g} s"
        except (httpx.HTTPError, OSError) as error:
            return True, f"{type(error).__name__}: {error}"
        except Exception as error:  # of an SDK or a URL: this event's, never the thread's end
            return False, f"{type(error).__name__}: {error}"
        if 200 <= status < 300:
            return False, ""
        return status >= 500 or status in _TRY_AGAIN, f"HTTP {status}"

    def _headers(self, event: Event) -> dict[str, Any]:
        timestamp = int(self._clock())
        key = read_webhook_secret(self._secret_file)
        return {
            "content-type": "application/json",
            "user-agent": f"glassbox/{__version__}",
            "webhook-id": event.id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signature(key, event.id, timestamp, event.body),
        }
