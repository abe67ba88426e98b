"""The output check on the CPU: puts by what was served of the checked rows, and reproduces it when the step is over.

Owns how a step's layers are checked together. What is found of them is `kernels/row_output_cpu.py`'s.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from glassbox.kernels.output_rounding import OutputRounding
from glassbox.kernels.row_output_cpu import row_output_cpu
from glassbox.kernels.row_plan import RowPlan
from glassbox.kernels.row_stats_cpu import KeyReader, LayerRows
from glassbox.measure.contract import CheckedLayers, Forward, OutputCheck, PackedLayer


@dataclass
class _Together:
    """Layers of one kind and one plan."""

    plan: RowPlan
    local_layers: list[int] = field(default_factory=list)
    layers: list[LayerRows] = field(default_factory=list)
    values: list[KeyReader] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    kept_kv: list[Tensor] = field(default_factory=list)


class CpuOutputCheck:
    """Of one step.

    Args:
        check: which rows and layers, and where what is found goes.
        rows: the step's row list.

    Attributes:
        rows: the checked ones, to be planned by themselves.
        local_layers: in which they are checked.
    """

    def __init__(self, check: OutputCheck, rows: np.ndarray) -> None:
        self._check = check
        self.rows, self.local_layers = rows[check.places], check.local_layers
        self._together: dict[Hashable, _Together] = {}

    def take(self, local: int, layer: PackedLayer, kv_cache: Tensor, forward: Forward, plan: RowPlan) -> None:
        """Put by a layer's queries, outputs, keys and values of the checked rows, which are planned."""
        if forward.output is None:
            return
        rows = LayerRows.select(forward.query, layer.reader(kv_cache), plan, layer.params)
        key = (id(plan), rows.kind, forward.key is None)
        together = self._together.setdefault(key, _Together(plan))
        together.local_layers.append(local)
        together.layers.append(rows)
        together.values.append(layer.value_reader(kv_cache))
        together.outputs.append(forward.output.index_select(0, plan.query_index))
        if forward.key is not None and forward.value is not None and forward.key.shape == forward.value.shape:
            kept = [part.index_select(0, plan.query_index) for part in (forward.key, forward.value)]
            together.kept_kv.append(torch.stack(kept, dim=1))

    def finish(self) -> None:
        """Reproduce, and hand over what was found."""
        for together in self._together.values():
            plan, first = together.plan, together.layers[0]
            at_once = plan.layers_at_once(first.num_heads, first.key_numbers, whole=True)
            for begin in range(0, len(together.layers), at_once):
                self._reproduce(together, slice(begin, begin + at_once))
        self._check.commit()

    def _reproduce(self, together: _Together, some: slice) -> None:
        layers, outputs = together.layers[some], torch.stack(together.outputs[some])
        kept = torch.stack(together.kept_kv[some]) if together.kept_kv else None
        sums, kv_sums = row_output_cpu(layers, together.values[some], outputs, together.plan, kept)
        # Of an FP8 cache the operands are rounded to the weights' type, so its unit is theirs.
        rounding = OutputRounding.of(layers[0].queries.dtype, outputs.dtype, fp8_cache=False, on_gpu=False)
        self._check.add(
            CheckedLayers(
                together.local_layers[some],
                sums.numpy(),
                None if kv_sums is None else kv_sums.numpy(),
                head_size=layers[0].queries.shape[2],
                roundoff=rounding.unit,
            )
        )
