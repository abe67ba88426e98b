"""Cumulative accumulators of one worker: histogram counts, sums, row counts and window maxima on the worker's device.

Owns the tensors and how rows are added to them on the CPU; on a GPU the kernel adds to the same tensors itself. It does
not know layers by name, requests, or how the numbers leave the process. Nothing is ever zeroed (counters in the sense
of Prometheus), except that the window maxima live in rotating slots.
"""

import threading
from typing import Final

import torch

from glassbox.core.accumulator_arrays import ARRAY, CUMULATIVE_ARRAYS, AccumulatorArray, AccumulatorArrays
from glassbox.core.statistics import INDEX, NUM_BUCKETS, NUM_STATISTICS, PHASES, STATISTICS

# The window of `max_logit_window_max`: this many slots of this length, so between 45 and 60 s.
WINDOW_SLOTS: Final = 4
WINDOW_SLOT_S: Final = 15.0

_NUM_PHASES: Final = len(PHASES)
_NONFINITE: Final = NUM_STATISTICS
_MAX_LOGIT: Final = INDEX["max_logit"]


class Accumulators:
    """Cumulative statistics of `num_layers` x `num_heads` (both local to the worker).

    `lock` is held while rows are added and while a copy is taken, so that a copy never shows half a step's layer.
    """

    def __init__(self, num_layers: int, num_heads: int, device: torch.device | str = "cpu") -> None:

        def empty(entry: AccumulatorArray, *slots: int) -> torch.Tensor:
            shape, dtype = (*slots, *entry.shape(num_layers, num_heads)), getattr(torch, entry.dtype)
            return torch.full(shape, entry.nothing, dtype=dtype, device=device)

        self.counts, self.sums = empty(ARRAY["counts"]), empty(ARRAY["sums"])
        self.rows, self.nonfinite = empty(ARRAY["rows"]), empty(ARRAY["nonfinite"])
        self.window_max = empty(ARRAY["window_max"], WINDOW_SLOTS)
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
        tensors = (self.counts, self.sums, self.rows, self.nonfinite, self.window_max, self.bounds)
        return sum(t.numel() * t.element_size() for t in tensors)

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

    def add(self, layers: torch.Tensor, stats: torch.Tensor, phases: torch.Tensor) -> None:
        """Add rows measured on the CPU.

        Args:
            layers: [N] int64, local layer of each entry of `stats`, each at most once.
            stats: [N, R, H, NUM_STATISTICS + 1] float32 as `kernels/row_stats_cpu.py` returns it; NaN is "no value".
            phases: [R] int64, index into PHASES of each row.
        """
        num, rows, heads, _ = stats.shape
        if rows == 0 or num == 0:
            return
        values = stats[..., :NUM_STATISTICS]
        present = ~values.isnan()
        # Values first bucketed per statistic: [S, N * R * H] against [S, B - 1]; `right=False` is `value <= bound`.
        by_statistic = values.permute(3, 0, 1, 2).reshape(NUM_STATISTICS, -1).contiguous()
        bucket = torch.searchsorted(self.bounds, by_statistic).view(NUM_STATISTICS, num, rows, heads)
        # Flat index into [N, H, 2, S] of each value.
        cell = torch.arange(num).view(num, 1, 1) * heads + torch.arange(heads).view(1, 1, heads)
        cell = cell * _NUM_PHASES + phases.view(1, rows, 1)  # [N, R, H]
        flat = cell.unsqueeze(-1) * NUM_STATISTICS + torch.arange(NUM_STATISTICS)  # [N, R, H, S]
        counts_index = (flat * NUM_BUCKETS + bucket.permute(1, 2, 3, 0))[present]
        cells = num * heads * _NUM_PHASES
        counts = torch.bincount(counts_index, minlength=cells * NUM_STATISTICS * NUM_BUCKETS)
        sums = torch.bincount(flat[present], values[present].double(), cells * NUM_STATISTICS)
        row_counts = torch.bincount(cell.reshape(-1), minlength=cells)
        nonfinite = torch.bincount(cell.reshape(-1), stats[..., _NONFINITE].reshape(-1).double(), cells)
        maxima = torch.full((cells,), -torch.inf)
        maxima.scatter_reduce_(
            0, cell.reshape(-1), values[..., _MAX_LOGIT].nan_to_num(nan=-torch.inf).reshape(-1), "amax"
        )
        shape = (num, heads, _NUM_PHASES)
        with self.lock:
            self.counts[layers, :heads] += counts.view(*shape, NUM_STATISTICS, NUM_BUCKETS)
            self.sums[layers, :heads] += sums.view(*shape, NUM_STATISTICS)
            self.rows[layers, :heads] += row_counts.view(shape)
            self.nonfinite[layers, :heads] += nonfinite.view(shape).long()
            slot = self.window_max[self._slot]
            slot[layers, :heads] = torch.maximum(slot[layers, :heads], maxima.view(shape))

    def copy(self) -> AccumulatorArrays:
        """A consistent copy on the host."""
        with self.lock:
            return AccumulatorArrays(
                **{name: getattr(self, name).cpu().numpy().copy() for name in CUMULATIVE_ARRAYS},
                window_max=self.window_max.amax(dim=0).cpu().numpy().copy(),
            )
