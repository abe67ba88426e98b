"""Rows of several layers, kept while they ran and measured in one launch, are what each layer's own launch gives."""

from dataclasses import replace

import pytest
import torch

from tests.kernels.interpreter import DEVICE

# isort: split
from glassbox.core.rows import ROW_SLOT
from glassbox.core.statistics import NUM_STATISTICS
from glassbox.kernels.cached_layers import ProbedLayers
from glassbox.kernels.paged_keys import MAX_HEAD_SIZE
from glassbox.kernels.row_keep import row_keep
from glassbox.kernels.row_stats import LayerAccumulators, RowStatsWorkspace, row_stats_layers
from tests.kernels import row_stats_cases as made
from tests.kernels.row_stats_cases import Case, Inputs, make_accumulators, make_inputs
from tests.kernels.test_row_stats import (
    UNWRITTEN,
    Kept,
    Run,
    assert_equal,
    assert_equals_reference,
    assert_previous_mass,
    bucketed,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CASES = [case for case in made.CASES if case.head_size <= MAX_HEAD_SIZE]
# Of four layers that have accumulators, those that are measured, in this order.
LAYERS, PLACES = 4, (3, 1)


def negated(inputs: Inputs) -> Inputs:
    """The next layer: other keys at the same places."""
    cache = inputs.k_cache.float().neg().to(inputs.k_cache.dtype)
    same = torch.empty_strided(
        inputs.k_cache.shape, inputs.k_cache.stride(), dtype=inputs.k_cache.dtype, device=DEVICE
    ).copy_(cache)
    return replace(inputs, k_cache=same, keys=[key.float().neg().to(key.dtype) for key in inputs.keys])


class LayersRun(Run):
    """A launch for two layers; `of` gives one of them."""

    def __init__(self, case: Case) -> None:
        first = make_inputs(case, DEVICE)
        count = int(first.num_rows)
        first.rows[:count, ROW_SLOT] = torch.arange(count - 1, -1, -1, dtype=torch.int32)
        self.of_layers = [first, negated(first)]
        shape = (LAYERS, case.heads)
        self.kept = torch.full((case.max_rows, *shape, case.head_size), UNWRITTEN, device=DEVICE).to(case.dtype)
        self.rings = torch.full((count, *shape, NUM_STATISTICS + 1), UNWRITTEN, device=DEVICE)
        self.previous = torch.full((count, *shape), UNWRITTEN, device=DEVICE)
        self.dense_layers = torch.full(
            (LAYERS, case.max_rows, case.heads, NUM_STATISTICS + 1), UNWRITTEN, device=DEVICE
        )
        self.all = [make_accumulators(case.heads, DEVICE) for _ in range(LAYERS)]
        one = self.all[0]
        self.accumulators = LayerAccumulators(
            *(torch.stack([getattr(a, name) for a in self.all]) for name in ("counts", "sums", "rows", "nonfinite")),
            window_max=torch.stack([a.window_max for a in self.all], 1),
            window_slot=one.window_slot,
            bounds=one.bounds,
        )
        self.workspace = RowStatsWorkspace(DEVICE, case.max_rows, case.heads, case.num_programs)
        for place, inputs in zip(PLACES, self.of_layers, strict=True):
            queries = torch.zeros(count, case.heads, case.head_size, dtype=case.dtype, device=DEVICE)
            row_keep(
                inputs.q, inputs.rows, inputs.num_rows, self.kept[:, place], like=inputs.k_cache, queries=queries,
                compiled={},
            )  # fmt: skip
        params = [inputs.params for inputs in self.of_layers]
        row_stats_layers(
            self.kept,
            ProbedLayers.of([inputs.k_cache for inputs in self.of_layers], params, case.heads),
            torch.tensor(PLACES, dtype=torch.int32, device=DEVICE),
            first.block_table, first.query_start_loc, first.seq_lens, first.rows, first.num_rows, params[0],
            self.accumulators, self.workspace, sink_tokens=first.sink_tokens, local_window=first.local_window,
            ring=self.rings, previous=self.previous, out=self.dense_layers,
        )  # fmt: skip

    def use(self, number: int) -> int:
        """Look at one of the two layers from now on; its place."""
        self.inputs = self.of_layers[number]
        self.dense = self.dense_layers[PLACES[number]]
        return PLACES[number]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_layer_is_as_near_to_float64_as_by_itself(case: Case) -> None:
    """Values, traced rows, the attention before, histograms; layers that are not measured stay as they were."""
    run = LayersRun(case)
    for number in range(len(PLACES)):
        place = run.use(number)
        assert_equals_reference(run)
        assert_equal(run.rings[:, place].cpu().flip(0), run.out)
        assert_previous_mass(run, run.previous[:, place].cpu().flip(0))
        one = replace(run.all[0], counts=run.accumulators.counts[place])
        assert torch.equal(run.accumulators.counts[place].cpu(), bucketed(run.out, run.phases, one))
        alone = Run(case, run.inputs)
        assert torch.equal(alone.accumulators.rows, run.accumulators.rows[place])
        assert torch.equal(alone.accumulators.nonfinite, run.accumulators.nonfinite[place])
        torch.testing.assert_close(alone.accumulators.window_max, run.accumulators.window_max[:, place])
        torch.testing.assert_close(alone.accumulators.sums, run.accumulators.sums[place], rtol=1e-4, atol=1e-4)
    untouched = [place for place in range(LAYERS) if place not in PLACES]
    assert not run.accumulators.rows[untouched].any()
    assert (run.dense_layers[untouched] == UNWRITTEN).all()
    assert not run.workspace.arrivals.any()


def test_what_is_kept_of_traced_rows() -> None:
    """Queries of all rows, and of those with a slot all that a check needs; nothing else is written."""
    case = replace(made.MIXED, slots=(3, -1, 0, *[-1] * 10))
    inputs, kept = make_inputs(case, DEVICE), Kept(case, case.head_size)
    queries = torch.full((5, case.heads, case.head_size), UNWRITTEN, dtype=case.dtype, device=DEVICE)
    of_rows = torch.full((case.max_rows, case.heads, case.head_size), UNWRITTEN, dtype=case.dtype, device=DEVICE)
    row_keep(
        inputs.q, inputs.rows, inputs.num_rows, of_rows, like=inputs.k_cache, queries=queries, compiled={},
        **kept.arguments,
    )  # fmt: skip
    kept.check(inputs)
    count = int(inputs.num_rows)
    assert torch.equal(of_rows[:count], inputs.q[inputs.rows[:count, 0].long()])
    assert (of_rows[count:] == UNWRITTEN).all()
    assert torch.equal(queries[[3, 0]], of_rows[[0, 2]])
    assert (queries[[1, 2, 4]] == UNWRITTEN).all()
