"""Canaries for tests of what is around them."""

from glassbox.measure.contract import CheckLimits
from glassbox.processes.worker.canary import Canary, WorkerPlace


def make_place(layers: tuple[int, ...], head_offset: int = 0) -> WorkerPlace:
    """A worker of rank 0 with these layers."""
    names = tuple(f"model.layers.{layer}.self_attn.attn" for layer in layers)
    return WorkerPlace(layers, names, head_offsets=(head_offset,) * len(layers), rank=0, host="here", vllm="0.99.0")


class QuietCanary(Canary):
    """Checks nothing; every layer may be observed."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        super().__init__(make_place(layers), CheckLimits(8, 1000), probation=False)

    def is_due(self, interval_s: float, layers: frozenset[int]) -> bool:
        """Never."""
        return False
