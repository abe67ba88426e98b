"""Replacing vLLM's methods, and putting them back."""

from collections.abc import Callable
from typing import Any


def patch_method(cls: type, name: str, make: Callable[[Any], Any]) -> Callable[[], None]:
    """Replace `cls.name` by `make(original)`; the returned function puts the original back."""
    original = cls.__dict__[name]
    setattr(cls, name, make(original))

    def restore() -> None:
        setattr(cls, name, original)

    return restore
