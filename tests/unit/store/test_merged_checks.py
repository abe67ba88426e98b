"""What the checks of ranks, stages and restarts say together, and whom they accuse."""

import itertools
import math

import numpy as np
import pytest

from glassbox.core.output_checks import LayerState
from glassbox.store.merge import MergedEngine, merge
from glassbox.store.merged_checks import NonfiniteOrigin, WrongLayer
from glassbox.store.snapshot import Snapshot
from tests.export_samples import changed, make_checks, make_snapshot

PENDING, CERTIFIED, FAILED = LayerState
NAN = math.nan


def rank(number: int, *, layers: tuple[int, ...] = (0, 1), **checks: object) -> Snapshot:
    """A worker of that rank with one head, whose checks have these values."""
    found = make_checks(len(layers), seed=number, first_head=number, heads=1, **checks)
    return make_snapshot(
        seed=number,
        layers=layers,
        rank=number,
        heads=1,
        head_offset=number,
        total_heads=4,
        host=f"gpu-{number}",
        checks=found,
    )


def merged(*snapshots: Snapshot) -> MergedEngine:
    """Of one engine, which is the same whatever the order of the files is."""
    (engine,) = merge(snapshots)
    for order in itertools.permutations(snapshots):
        (other,) = merge(order)
        assert (engine.wrong, engine.nonfinite_origins) == (other.wrong, other.nonfinite_origins)
        for name, array in vars(engine.checks).items():
            np.testing.assert_array_equal(array, getattr(other.checks, name), err_msg=name)
    return engine


class TestState:
    @pytest.mark.parametrize(
        ("first", "second", "together"),
        [
            (CERTIFIED, CERTIFIED, CERTIFIED),
            (CERTIFIED, PENDING, PENDING),
            (PENDING, PENDING, PENDING),
            (CERTIFIED, FAILED, FAILED),
            (PENDING, FAILED, FAILED),
            (FAILED, FAILED, FAILED),
        ],
    )
    def test_a_layer_is_certified_on_all_ranks_and_fails_on_one(
        self, first: LayerState, second: LayerState, together: LayerState
    ) -> None:
        """Layer 1 on two ranks; layer 0 is certified on both."""
        engine = merged(rank(0, state=[CERTIFIED, first]), rank(1, state=[CERTIFIED, second]))
        assert [CERTIFIED, together] == engine.checks.state.tolist()

    def test_a_layer_is_judged_by_the_stage_that_has_it(self) -> None:
        """Pipeline stages: what the other stage doesn't have is not pending there."""
        stages = [rank(0, layers=(0, 2)), changed(rank(0, layers=(5,), state=PENDING), instance="second")]
        assert [CERTIFIED, CERTIFIED, PENDING] == merged(*stages).checks.state.tolist()

    def test_of_a_worker_that_is_gone_only_counts_remain(self) -> None:
        """It failed and was restarted: the new one has not checked anything yet."""
        gone = changed(rank(0, state=FAILED, worst_ratio=50.0), instance="gone", first_nonfinite_layer=1)
        again = rank(0, state=PENDING, worst_ratio=NAN, worst_head=-1, kv_error=NAN)
        engine = merged(gone, changed(again, instance="again", time_s=gone.time_s + 60))
        assert [PENDING, PENDING] == engine.checks.state.tolist()
        assert np.isnan(engine.checks.worst_ratio).all()
        assert np.isnan(engine.checks.kv_error).all()
        assert ((), ()) == (engine.wrong, engine.nonfinite_origins)
        np.testing.assert_array_equal(2 * gone.checks.error_counts, engine.checks.error_counts)


class TestNumbers:
    def test_counts_add_up_over_ranks_and_layers_stay_apart(self) -> None:
        """Two stages of two ranks: each layer has what its own ranks counted."""
        ranks = [rank(number, layers=(1, 4)) for number in range(2)]
        other = [changed(rank(number, layers=(2,)), instance=f"stage1-{number}") for number in range(2)]
        checks = merged(*ranks, *other).checks
        np.testing.assert_array_equal(
            ranks[0].checks.error_counts + ranks[1].checks.error_counts, checks.error_counts[[0, 2]]
        )
        np.testing.assert_array_equal(other[0].checks.error_sums + other[1].checks.error_sums, checks.error_sums[[1]])

    def test_the_worst_head_is_that_of_the_largest_ratio(self) -> None:
        """A rank that has not checked a layer says nothing about it."""
        first = rank(0, worst_ratio=[0.5, NAN], worst_head=[0, -1])
        second = rank(1, worst_ratio=[0.25, NAN], worst_head=[1, -1])
        third = rank(2, worst_ratio=[NAN, 0.75], worst_head=[-1, 2])
        checks = merged(first, second, third).checks
        np.testing.assert_array_equal([0.5, 0.75], checks.worst_ratio)
        assert [0, 2] == checks.worst_head.tolist()

    def test_of_the_cache_the_largest_error_counts(self) -> None:
        """Per layer and tensor; NaN only where no rank knows."""
        first = rank(0, kv_error=[[0.02, NAN], [NAN, 0.03]], kv_saturated=[[0.0, 0.5], [NAN, NAN]])
        second = rank(1, kv_error=[[0.25, NAN], [0.5, 0.01]], kv_saturated=[[0.125, 0.25], [NAN, 0.0]])
        checks = merged(first, second).checks
        np.testing.assert_array_equal(np.float32([[0.25, NAN], [0.5, 0.03]]), checks.kv_error)
        np.testing.assert_array_equal(np.float32([[0.125, 0.5], [NAN, 0.0]]), checks.kv_saturated)

    def test_an_engine_without_layers_has_none_to_check(self) -> None:
        """All of them are bypassed."""
        engine = merged(make_snapshot(layers=()))
        assert 0 == len(engine.checks.state)
        assert 2 == merged(rank(0), changed(make_snapshot(layers=()), rank=1)).checks.state.sum()


class TestAccused:
    def test_each_rank_names_its_wrong_layers(self) -> None:
        """Layer, head, rank, host and ratio; one that isn't known is infinite."""
        first = rank(0, layers=(3, 7), state=[CERTIFIED, FAILED], worst_ratio=[0.5, 40.0])
        second = rank(1, layers=(3, 7), state=FAILED, worst_ratio=[2.0, NAN], worst_head=[1, -1])
        expected = (
            WrongLayer(3, 1, 1, "gpu-1", 2.0),
            WrongLayer(7, -1, 1, "gpu-1", math.inf),
            WrongLayer(7, 0, 0, "gpu-0", 40.0),
        )
        assert expected == merged(first, second).wrong

    def test_non_finite_rows_begin_at_the_first_layer_of_each_rank(self) -> None:
        """Two stages on one host are one rank's series: the earlier layer stands."""
        first = changed(rank(0, layers=(0, 1)), first_nonfinite_layer=1)
        later = changed(rank(0, layers=(2, 3)), instance="later", first_nonfinite_layer=2)
        other, healthy = changed(rank(1), first_nonfinite_layer=0), rank(2)
        expected = (NonfiniteOrigin(0, 1, "gpu-1"), NonfiniteOrigin(1, 0, "gpu-0"))
        assert expected == merged(first, later, other, healthy).nonfinite_origins
