"""A layer whose cache and batch are those of made inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from glassbox.kernels.layer_params import LayerParams
from glassbox.measure.contract import BatchTables
from tests.kernels.row_stats_cases import Inputs


@dataclass
class InputsLayer:
    """See contract.StridedLayer."""

    inputs: Inputs
    num_heads: int
    head_size: int
    name: str = "layer"
    gave_kv: bool = True

    @property
    def params(self) -> LayerParams:
        return self.inputs.params

    @property
    def query_dtype(self) -> torch.dtype:
        return self.inputs.q.dtype

    @property
    def address(self) -> int:
        return self.inputs.k_cache.data_ptr()

    def keys(self, kv_cache: Tensor | None = None) -> Tensor:
        return self.inputs.k_cache

    def values(self, kv_cache: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def tables(self) -> BatchTables:
        return BatchTables(self.inputs.block_table, self.inputs.query_start_loc, self.inputs.seq_lens, self)
