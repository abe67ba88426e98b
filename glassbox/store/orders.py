"""What a rule asks of the API server that serves a request: to end it, or to tag its response.

Owns these small files of the run directory and their answers. The exporter gives orders, every API server of the node
reads them, and the one that has the request answers. An order that nobody has answered in time is withdrawn.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

from glassbox.core.files import FileVersion
from glassbox.core.logs import get_logger
from glassbox.store.trusted_file import MAX_NOTE_BYTES, list_files, make_folder, read_json, write_file

logger = get_logger(__name__)

FOLDER: Final = "orders"
# An API server takes one within tenths of a second. Older ones were left by an exporter that died.
VALID_S: Final = 5.0
MAX_OPEN: Final = 1024
_ORDER: Final = ".json"
_ANSWER: Final = ".done"

Do = Literal["abort", "tag"]
# late: the request, or the moment at which its response could be tagged, was over.
AnswerOutcome = Literal["done", "late", "failed"]
_OUTCOMES: Final[tuple[AnswerOutcome, ...]] = ("done", "late", "failed")


@dataclass(frozen=True)
class Order:
    """Of one rule for one request.

    Attributes:
        internal_id, request_id: vLLM's own id, and the external one.
        do: what is asked.
        rule: its name.
        time_s: Unix time at which it was given.
    """

    internal_id: str
    request_id: str
    do: Do
    rule: str
    time_s: float

    @property
    def name(self) -> str:
        """Of its file, without the ending."""
        whole = f"{self.do}/{self.rule}/{self.internal_id}".encode("utf-8", "surrogatepass")
        return hashlib.sha256(whole).hexdigest()[:32]


def give(run_dir: Path, order: Order) -> None:
    """Leave an order for the API servers.

    Raises:
        OSError: it can't be written, or nobody would read it.
    """
    data = json.dumps(asdict(order)).encode()
    if len(data) > MAX_NOTE_BYTES:
        raise OSError(
            f"an order must have at most {MAX_NOTE_BYTES} bytes, got {len(data)}, most of them the request's id; bound "
            "X-Request-Id in front of vLLM"
        )
    folder = Path(run_dir) / FOLDER
    make_folder(folder)
    write_file(folder / f"{order.name}{_ORDER}", data)


def answer(run_dir: Path, order: Order, outcome: AnswerOutcome) -> None:
    """Tell the exporter what became of an order.

    Raises:
        OSError: it can't be written.
    """
    write_file(Path(run_dir) / FOLDER / f"{order.name}{_ANSWER}", json.dumps({"outcome": outcome}).encode())


def answers(run_dir: Path) -> dict[str, AnswerOutcome]:
    """Outcomes of the answered orders, by name; one that can't be read counts as failed.

    Raises:
        OSError: the folder may not be listed, or is not this user's.
    """
    folder = Path(run_dir) / FOLDER
    found: dict[str, AnswerOutcome] = {}
    for name in list_files(folder, "", _ANSWER):
        outcome = "failed"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            outcome = read_json(folder / name)["outcome"]
        found[name.removesuffix(_ANSWER)] = next((known for known in _OUTCOMES if known == outcome), "failed")
    return found


def withdraw(run_dir: Path, name: str) -> None:
    """Remove an order and its answer."""
    for ending in (_ORDER, _ANSWER):
        with contextlib.suppress(OSError):
            (Path(run_dir) / FOLDER / f"{name}{ending}").unlink()


def withdraw_all(run_dir: Path) -> None:
    """Remove what an exporter before has left.

    Raises:
        OSError: the folder may not be listed, or is not this user's.
    """
    for ending in (_ORDER, _ANSWER):
        for name in list_files(Path(run_dir) / FOLDER, "", ending):
            withdraw(run_dir, name.removesuffix(ending))


class OrderReader:
    """The orders for an API server; each is read once."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = Path(run_dir)
        self._seen: dict[str, FileVersion] = {}

    def fresh(self, now_s: float | None = None) -> Iterator[Order]:
        """Those given since the last call that are still valid.

        Raises:
            OSError: the folder may not be listed, or is not this user's.
        """
        now_s = time.time() if now_s is None else now_s
        folder = self._run_dir / FOLDER
        found = list_files(folder, "", _ORDER)
        new = [name for name, version in found.items() if self._seen.get(name) != version]
        self._seen = found
        for name in new[:MAX_OPEN]:
            order = _read(folder / name)
            if order is not None and abs(now_s - order.time_s) <= VALID_S:
                yield order


def _read(path: Path) -> Order | None:
    try:
        order = Order(**read_json(path))
        texts = (order.internal_id, order.request_id, order.rule)
        if not all(isinstance(text, str) for text in texts) or order.do not in {"abort", "tag"}:
            raise TypeError("ids must be texts, and what to do known")
        return Order(*texts[:2], order.do, order.rule, float(order.time_s))
    except (OSError, ValueError, TypeError, ArithmeticError) as error:
        logger.debug("%s: %s", path.name, error)
        return None
