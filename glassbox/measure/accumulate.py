"""Cumulative accumulators of one worker: histogram counts, sums, row counts and window maxima on the worker's device.

Owns the tensors and how rows are added to them on the CPU; on a GPU the kernel adds to the same tensors itself. It does
not know layers by name, requests, or how the numbers leave the process. Nothing is ever zeroed (counters in the sense
of Prometheus), except that the window maxima live in rotating slots.
"""

import threading
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from glassbox.core.accumulator_arrays import (
    ARRAY,
    CUMULATIVE_ARRAYS,
    AccumulatorArray,
    AdapterArrays,
    MeasuredArrays,
)
from glassbox.core.statistics import INDEX, NUM_BUCKETS, NUM_STATISTICS, PHASES, STATISTICS

# The window of `max_logit_window_max`: this many slots of this length, so between 45 and 60 s.
WINDOW_SLOTS: Final = 4
WINDOW_SLOT_S: Final = 15.0

_NUM_PHASES: Final = len(PHASES)
_NONFINITE: Final = NUM_STATISTICS
_MAX_LOGIT: Final = INDEX["max_logit"]
# Of statistics that are added together; their indices and counts take some 30 bytes each.
_CACHED_VALUES: Final = 1 << 16


class Accumulators:
    """Cumulative statistics of `num_layers` x `num_heads` (both local to the worker).

    Rows of several LoRA adapters are told apart by the axis of the heads: first all heads of the first slot of
    `core/adapter_slots.py`, then all of the next one. Not so the window maxima.

    `lock` is held while rows are added and while a copy is taken, so that a copy never shows half a step's layer.

    Args:
        num_adapters: slots of adapters; 1 tells none apart.
        adapter_layers: local layers that are shown by adapter; None is all. A layer that another rank has as well is
            one rank's.
    """

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        device: torch.device | str = "cpu",
        *,
        num_adapters: int = 1,
        adapter_layers: Sequence[int] | None = None,
    ) -> None:

        def empty(entry: AccumulatorArray, *places: int) -> torch.Tensor:
            shape, dtype = entry.shape(*places), getattr(torch, entry.dtype)
            return torch.full(shape, entry.nothing, dtype=dtype, device=device)

        self.num_layers, self.num_heads, self.num_adapters = num_layers, num_heads, num_adapters
        places = (num_layers, num_adapters * num_heads)
        self.counts, self.sums = empty(ARRAY["counts"], *places), empty(ARRAY["sums"], *places)
        self.rows, self.nonfinite = empty(ARRAY["rows"], *places), empty(ARRAY["nonfinite"], *places)
        self.window_max = torch.stack([empty(ARRAY["window_max"], num_layers, num_heads)] * WINDOW_SLOTS)
        # Where `reduced` leaves sums: over adapters, over heads, and over heads and layers.
        self._reduced: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        if num_adapters > 1:
            self._reduced = {
                name: (
                    empty(ARRAY[name], num_layers, num_heads),
                    empty(ARRAY[name], num_layers, num_adapters),
                    empty(ARRAY[name], num_adapters),
                )
                for name in CUMULATIVE_ARRAYS
            }
        hidden = [adapter_layers is not None and layer not in adapter_layers for layer in range(num_layers)]
        self._hidden = torch.tensor(hidden, device=device) if any(hidden) else None
        # [S, B - 1], the finite upper bounds (`le`).
        self.bounds = torch.tensor([s.buckets for s in STATISTICS], dtype=torch.float32, device=device)
        # The slot of `window_max` in use, where a kernel can read it.
        self.window_slot = torch.zeros(1, dtype=torch.int32, device=device)
        self.lock = threading.Lock()
        self._slot = 0
        self._slot_number: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the accumulators on the device."""
        reduced = [tensor for of_array in self._reduced.values() for tensor in of_array]
        tensors = (self.counts, self.sums, self.rows, self.nonfinite, self.window_max, self.bounds, *reduced)
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def window(self) -> torch.Tensor:
        """The slot of `window_max` in use, [L, H, PHASES]."""
        return self.window_max[self._slot]

    def rotate(self, now_s: float) -> None:
        """Move on to the slot of `now_s` (seconds, any steady clock) and forget maxima older than the window.

        On a GPU this is queued on the current stream; the caller orders it against launches that add rows.
        """
        number = int(now_s // WINDOW_SLOT_S)
        if self._slot_number is None:
            self._slot_number = number
        if number <= self._slot_number:
            return
        with self.lock:
            for _ in range(min(number - self._slot_number, WINDOW_SLOTS)):
                self._slot = (self._slot + 1) % WINDOW_SLOTS
                self.window_max[self._slot].fill_(-torch.inf)
            self.window_slot.fill_(self._slot)
            self._slot_number = number

    def add(
        self, layers: torch.Tensor, stats: torch.Tensor, phases: torch.Tensor, adapters: torch.Tensor | None = None
    ) -> None:
        """Add rows measured on the CPU.

        Args:
            layers: [N] int64, local layer of each entry of `stats`, each at most once.
            stats: [N, R, H, NUM_STATISTICS + 1] float32 as `kernels/row_stats_cpu.py` returns it; NaN is "no value".
            phases: [R] int64, index into PHASES of each row.
            adapters: [R] int64, slot of each row; None is the first one's.
        """
        if adapters is None:
            self._add(layers, stats, phases, 0)
            return
        # A step has rows of few adapters; an index of its own for each of the slots would be as large as all of them.
        for slot in adapters.unique().tolist():
            its = torch.nonzero(adapters == slot)[:, 0]
            self._add(layers, stats[:, its], phases[its], slot)

    def _add(self, layers: torch.Tensor, stats: torch.Tensor, phases: torch.Tensor, adapter: int) -> None:
        num, rows, heads, _ = stats.shape
        if rows == 0 or num == 0:
            return
        # So many layers at once that what is computed of them stays in a core's cache.
        some = max(_CACHED_VALUES // (rows * heads * NUM_STATISTICS), 1)
        for start in range(0, num, some):
            self._add_some(layers[start : start + some], stats[start : start + some], phases, adapter)

    def _add_some(self, layers: torch.Tensor, stats: torch.Tensor, phases: torch.Tensor, adapter: int) -> None:
        num, rows, heads, _ = stats.shape
        values = stats[..., :NUM_STATISTICS]
        # As many bounds as are below a value: its bucket. Comparing all is vectorised, searching is not.
        bucket = torch.zeros(values.shape, dtype=torch.uint8)
        for bounds in self.bounds.T:
            bucket += values > bounds
        # Flat index into [N, H, 2, S] of each value; those that are none go behind the last one.
        cell = torch.arange(num).view(num, 1, 1) * heads + torch.arange(heads).view(1, 1, heads)
        cell = cell * _NUM_PHASES + phases.view(1, rows, 1)  # [N, R, H]
        cells = num * heads * _NUM_PHASES
        places = cells * NUM_STATISTICS
        absent = values.isnan()
        flat = (cell.unsqueeze(-1) * NUM_STATISTICS + torch.arange(NUM_STATISTICS)).masked_fill_(absent, places)
        counts = torch.bincount((flat * NUM_BUCKETS + bucket).view(-1), minlength=places * NUM_BUCKETS)
        sums = torch.bincount(flat.view(-1), values.masked_fill(absent, 0.0).reshape(-1).double(), places)
        row_counts = torch.bincount(cell.reshape(-1), minlength=cells)
        nonfinite = torch.bincount(cell.reshape(-1), stats[..., _NONFINITE].reshape(-1).double(), cells)
        maxima = torch.full((cells,), -torch.inf)
        maxima.scatter_reduce_(
            0, cell.reshape(-1), values[..., _MAX_LOGIT].nan_to_num(nan=-torch.inf).reshape(-1), "amax"
        )
        shape = (num, heads, _NUM_PHASES)
        its = slice(adapter * self.num_heads, adapter * self.num_heads + heads)
        with self.lock:
            self.counts[layers, its] += counts[: places * NUM_BUCKETS].view(*shape, NUM_STATISTICS, NUM_BUCKETS)
            self.sums[layers, its] += sums[:places].view(*shape, NUM_STATISTICS)
            self.rows[layers, its] += row_counts.view(shape)
            self.nonfinite[layers, its] += nonfinite.view(shape).long()
            slot = self.window
            slot[layers, :heads] = torch.maximum(slot[layers, :heads], maxima.view(shape))

    def exported(self) -> tuple[torch.Tensor, ...]:
        """What leaves the device, for `to_arrays`: without adapters the accumulators, else what they add up to.

        On a GPU the sums are queued on the current stream; the caller orders them against launches that add rows, and
        against its next call.
        """
        totals, by_adapter = [], []
        for name in CUMULATIVE_ARRAYS:
            array = getattr(self, name)
            if not self._reduced:
                totals.append(array)
                continue
            total, of_layers, of_adapters = self._reduced[name]
            apart = array.view(self.num_layers, self.num_adapters, self.num_heads, *array.shape[2:])
            totals.append(torch.sum(apart, 1, out=total))
            torch.sum(apart, 2, out=of_layers)
            if self._hidden is not None:
                of_layers.masked_fill_(self._hidden.view(-1, *[1] * (of_layers.dim() - 1)), 0)
            by_adapter.append(torch.sum(of_layers, 0, out=of_adapters))
        return *totals, self.window_max, *by_adapter

    @staticmethod
    def to_arrays(exported: Sequence[npt.NDArray[Any]]) -> MeasuredArrays:
        """What `exported` gave, on the host; the arrays are kept."""
        num = len(CUMULATIVE_ARRAYS)
        totals, window_max, by_adapter = exported[:num], exported[num], exported[num + 1 :]
        return MeasuredArrays(
            **dict(zip(CUMULATIVE_ARRAYS, totals, strict=True)),
            window_max=np.asarray(window_max.max(axis=0)),
            by_adapter=AdapterArrays(*by_adapter) if by_adapter else None,
        )

    def copy(self) -> MeasuredArrays:
        """A consistent copy on the host."""
        with self.lock:
            return self.to_arrays([tensor.cpu().numpy().copy() for tensor in self.exported()])
