"""The Triton kernel against the float64 reference: in Triton's interpreter without a GPU, compiled with one."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from glassbox.kernels.reference.row_stats import row_stats_ref
from glassbox.kernels.row_stats import LayerAccumulators, LayerParams, RowStatsWorkspace, Tiling, row_stats
from glassbox.statistics import INDEX, NUM_BUCKETS, NUM_STATISTICS, STATISTICS
from tests.kernels.row_stats_cases import BASE, CASES, LARGE, MIXED, Case, Inputs, Sequence, make_accumulators, make_inputs
from tests.kernels.tolerances import assert_two_oracles

DEVICE = "cuda" if ON_GPU else "cpu"
UNWRITTEN = -7.5
MAX_LOGIT = INDEX["max_logit"]
