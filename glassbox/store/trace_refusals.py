"""Which requests a worker did not trace although their answers were to speak of it, told by it in a file.

Owns the file of each worker: its newest refusals, each with its reason in words. Without it an answer could only wait
for a trace that never comes.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from glassbox.store.file_cache import FileCache
from glassbox.store.file_names import clean
from glassbox.store.trusted_file import list_files, read_json, write_file

PREFIX: Final = "refused-"
SUFFIX: Final = ".json"
# They are read within tenths of a second.
MAX_REFUSALS: Final = 256
MAX_WHY: Final = 300
_MAX_BYTES: Final = 1 << 19


@dataclass(frozen=True)
class Refusal:
    """Of one request.

    Attributes:
        request: what tells it from others, without saying who asked; see `file_names.request_digest`.
        why: in words.
        time_s: Unix time at which it came.
        lacks_layers: the worker measures none of the layers that were asked for: those that do may trace it.
    """

    request: str
    why: str
    time_s: float
    lacks_layers: bool = False


@dataclass(frozen=True)
class WorkerRefusals:
    """What one worker has refused.

    Attributes:
        engine, instance: of the worker.
        refusals: by request.
    """

    engine: str
    instance: str
    refusals: dict[str, Refusal]


def write_refusals(run_dir: Path, engine: str, rank: int, instance: str, refusals: Iterable[Refusal]) -> None:
    """Replace a worker's file.

    Raises:
        OSError: it can't be written.
    """
    told = [asdict(refusal) | {"why": refusal.why[:MAX_WHY]} for refusal in refusals][-MAX_REFUSALS:]
    content = {"engine": engine, "instance": instance, "refusals": told}
    write_file(Path(run_dir) / f"{PREFIX}{clean(engine)}-{rank}{SUFFIX}", json.dumps(content).encode())


class RefusalReader:
    """The refusals of all workers of a server; a file is read again only when it was replaced. Not thread-safe."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = Path(run_dir)
        self._files = FileCache(lambda name: _read(self._run_dir / name))

    def read(self) -> list[WorkerRefusals]:
        """What is there now; a file that can't be read says nothing.

        Raises:
            OSError: the run directory may not be listed, or is not this user's.
        """
        found = list_files(self._run_dir, PREFIX, SUFFIX)
        self._files.keep(found)
        told = [self._files.of(name, version) for name, version in found.items()]
        return [refusals for refusals in told if refusals is not None]


def _read(path: Path) -> WorkerRefusals | None:
    try:
        content = read_json(path, _MAX_BYTES)
        found = [_refusal(one) for one in content["refusals"][-MAX_REFUSALS:]]
        engine, instance = content["engine"], content["instance"]
        if not (isinstance(engine, str) and isinstance(instance, str)):
            return None
        return WorkerRefusals(engine, instance, {refusal.request: refusal for refusal in found})
    except (OSError, ValueError, TypeError, KeyError, ArithmeticError):
        return None


def _refusal(content: dict[str, Any]) -> Refusal:
    refusal = Refusal(**content)
    if not (isinstance(refusal.request, str) and isinstance(refusal.why, str)):
        raise TypeError("a request and its reason must be texts")
    return Refusal(refusal.request, refusal.why[:MAX_WHY], float(refusal.time_s), bool(refusal.lacks_layers))
