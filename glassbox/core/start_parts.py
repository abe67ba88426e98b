"""What glassbox adds to the start of a worker, by part: the seconds of each, in which nothing else of it counts.

Owns the list of parts and their clock. What takes the time says so where it is done; the worker tells it as
`glassbox_start_seconds`, and in one line of its log.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

# Values of the label `part`, in the order of a start, and what each holds.
START_PARTS: Final[Mapping[str, str]] = {
    "register": "reading the YAML and changing vLLM, as in each of its processes",
    "import": "importing what measures",
    "kernels": "compiling and loading kernels, or finding them in a cache; on a GPU by launches in and after warm-up",
    "prepare": "looking at the model's layers and allocating what is counted",
    "graphs": "making the second executable of each CUDA graph",
    "arm": "the rest, after vLLM's warm-up",
}


class StartParts:
    """Seconds of each part so far; used by the thread that starts the worker.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds = dict.fromkeys(START_PARTS, 0.0)
        # Of the parts that are under way, what those within them have taken.
        self._inner: list[float] = []

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """The block is of this part, but for parts within it."""
        if part not in self._seconds:
            raise KeyError(f"a part must be one of {', '.join(START_PARTS)}, got {part}")
        started = self._clock()
        self._inner.append(0.0)
        try:
            yield
        finally:
            took = self._clock() - started
            self._seconds[part] += took - self._inner.pop()
            if self._inner:
                self._inner[-1] += took

    def seconds(self) -> dict[str, float]:
        """Of every part."""
        return dict(self._seconds)

    def line(self) -> str:
        """For the log: all parts together, and those that took more than a millisecond."""
        parts = ", ".join(f"{part} {took:.2f}" for part, took in self._seconds.items() if took > 0.001)
        return f"glassbox took {sum(self._seconds.values()):.2f} s of this worker's start ({parts})"
