"""CUDA's streams and events where there is no GPU: what would be queued is done when the call returns."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor


class Stream(SimpleNamespace):
    """In whose order everything is."""

    cuda_stream = 0

    def wait_event(self, _: object) -> None:
        """It has happened."""


class Event(SimpleNamespace):
    """That has happened when it is recorded."""

    def record(self) -> None:
        """Nothing is left to be done."""

    def synchronize(self) -> None:
        """Nor to be waited for."""

    def query(self) -> bool:
        return True


_empty = torch.empty


def pageable_empty(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
    return _empty(*size, **options)


def queue_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the CPU were a GPU, on which no graph is captured."""
    for name, replacement in {
        "Stream": lambda *_, **__: Stream(),
        "Event": lambda *_, **__: Event(),
        "current_stream": Stream,
        "stream": lambda _: nullcontext(),
        "is_current_stream_capturing": lambda: False,
    }.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch, "empty", pageable_empty)
