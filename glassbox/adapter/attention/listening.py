"""Which `forward` observed attention impls have at the moment: glassbox's while it listens, vLLM's own in between.

A method that asks in every layer of every step whether there is anything to do costs 3 to 8 us a call between two
attention kernels on a CPU, as much as all else that glassbox does in a step that is not measured. So it is put into the
classes for warm-up and for measured steps, and taken out again.
"""

from collections.abc import Callable
from typing import Any


class Listening:
    """The observed impl classes of a process, and whether glassbox listens to them.

    Attributes:
        on: it does.
    """

    def __init__(self) -> None:
        self._forwards: dict[Any, Callable[..., Any]] = {}
        self.on = False

    def add(self, impl: type, forward: Callable[..., Any]) -> None:
        """Let `forward` be the method of `impl`, a class without one of its own, while glassbox listens."""
        self._forwards[impl] = forward
        self._apply(impl, forward)

    def listen(self, on: bool) -> None:
        """Begin or end to listen to all layers of this process."""
        if on != self.on:
            self.on = on
            for impl, forward in self._forwards.items():
                self._apply(impl, forward)

    def _apply(self, impl: Any, forward: Callable[..., Any]) -> None:
        if self.on:
            impl.forward = forward
        elif "forward" in impl.__dict__:
            del impl.forward
