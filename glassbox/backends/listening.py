"""Which `forward` observed attention impls have at the moment: glassbox's while it listens, vLLM's own in between.

A method that asks in every layer of every step whether there is anything to do costs 3 to 8 us a call between two
attention kernels on a CPU, as much as all else that glassbox does in a step that is not measured. So it is put into the
classes for warm-up and for measured steps, and taken out again.
"""

from collections.abc import Callable
from typing import Any

_forwards: dict[Any, Callable[..., Any]] = {}
_listening = False


def add(impl: type, forward: Callable[..., Any]) -> None:
    """Let `forward` be the method of `impl`, a class without one of its own, while glassbox listens."""
    _forwards[impl] = forward
    _apply(impl, forward)


def listen(on: bool) -> None:
    """Begin or end to listen to all layers of this process."""
    global _listening  # noqa: PLW0603 (vLLM's classes are per process, and so is this)
    if on != _listening:
        _listening = on
        for impl, forward in _forwards.items():
            _apply(impl, forward)


def _apply(impl: Any, forward: Callable[..., Any]) -> None:
    if _listening:
        impl.forward = forward
    elif "forward" in impl.__dict__:
        del impl.forward
