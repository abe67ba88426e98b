"""Which forward methods observed attention impls have at the moment: glassbox's while it listens, vLLM's in between.

A method that asks in every layer of every step whether there is anything to do costs 3 to 8 us a call between two
attention kernels on a CPU, as much as all else that glassbox does in a step that is not measured. So it is put into the
classes for warm-up and for measured steps, and taken out again.
"""

from collections.abc import Callable, Mapping
from typing import Any


class Listening:
    """The observed impl classes of a process, and whether glassbox listens to them.

    Attributes:
        on: it does.
    """

    def __init__(self) -> None:
        self._methods: dict[Any, Mapping[str, Callable[..., Any]]] = {}
        self.on = False

    def add(self, impl: type, **methods: Callable[..., Any]) -> None:
        """Let `methods` be those of `impl`, a class without such of its own, while glassbox listens."""
        self._methods[impl] = methods
        self._apply(impl, methods)

    def listen(self, on: bool) -> None:
        """Begin or end to listen to all layers of this process."""
        if on != self.on:
            self.on = on
            for impl, methods in self._methods.items():
                self._apply(impl, methods)

    def _apply(self, impl: Any, methods: Mapping[str, Callable[..., Any]]) -> None:
        for name, method in methods.items():
            if self.on:
                setattr(impl, name, method)
            elif name in impl.__dict__:
                delattr(impl, name)
