"""Which rows are listed in which layer: neither fewer nor more than somebody wants there."""

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from glassbox.core.rows import NUM_ROW_COLUMNS, ROW_DECODE, ROW_PHASE, ROW_QUERY, ROW_SLOT, ROW_UNCOUNTED
from glassbox.measure.contract import LayeredRows
from glassbox.measure.row_lists import RowList, row_lists


def rows_with(*counted: bool) -> npt.NDArray[np.int32]:
    """A step's rows, each with a slot."""
    rows = np.zeros((len(counted), NUM_ROW_COLUMNS), dtype=np.int32)
    rows[:, ROW_QUERY] = rows[:, ROW_SLOT] = np.arange(len(counted))
    rows[:, ROW_PHASE] = ROW_DECODE | np.where(counted, 0, ROW_UNCOUNTED)
    return rows


def wanted(layers: set[int], *places: int) -> LayeredRows:
    return LayeredRows(frozenset(layers), np.array(places, dtype=np.int64))


def by_layer(lists: list[RowList]) -> dict[int, RowList]:
    found = {local: one for one in lists for local in one.local_layers}
    assert len(found) == sum(len(one.local_layers) for one in lists), "a layer has one list"
    return found


LAYERS = st.frozensets(st.integers(0, 4))


@settings(deadline=None)
@given(
    st.lists(st.booleans(), min_size=1, max_size=6),
    LAYERS,
    st.lists(st.tuples(LAYERS, st.frozensets(st.integers(0, 5))), max_size=4),
)
def test_each_layer_has_what_is_wanted_there(
    counted: list[bool], sampled: frozenset[int], asked: list[tuple[frozenset[int], frozenset[int]]]
) -> None:
    """Of every row and layer: listed if the sample or another wants it, counted if the sample does, and with a slot if
    another does."""
    rows = rows_with(*counted)
    others = [wanted(set(layers), *sorted(n for n in places if n < len(rows))) for layers, places in asked]
    found = by_layer(row_lists(rows, sampled, others))
    for local in range(5):
        in_sample = {n for n, one in enumerate(counted) if one and local in sampled}
        of_others = {n for one in others if local in one.local_layers for n in one.places.tolist()}
        if local not in found:
            assert not in_sample | of_others
            continue
        one = found[local]
        assert sorted(in_sample | of_others) == one.places.tolist() == one.rows[:, ROW_QUERY].tolist()
        assert in_sample == set(one.places[one.counted].tolist())
        assert of_others == set(one.rows[one.rows[:, ROW_SLOT] >= 0, ROW_SLOT].tolist())
        assert (one.rows[:, ROW_PHASE] & ROW_DECODE).all()
    assert rows[:, ROW_SLOT].tolist() == list(range(len(rows))), "the step's own rows stay as they are"


def test_layers_of_which_the_same_is_wanted_share_a_list() -> None:
    """The usual step has one, whatever its traces keep, as long as it is the same layers."""
    rows = rows_with(True, True, False)
    assert 1 == len(row_lists(rows, frozenset(range(32))))
    assert 1 == len(row_lists(rows, frozenset(range(32)), [wanted(set(range(32)), 2), wanted(set(range(32)), 0)]))


def test_more_lists_than_there_is_room_for() -> None:
    """What others want is not told apart then, and the sample still is: counted in its own layers alone."""
    rows = rows_with(True, True, True, False)
    others = [wanted({1, 2}, 0), wanted({2, 3}, 1), wanted({3, 4}, 3), wanted({1, 4}, 2), wanted({5}, 0, 1, 2)]
    exact, rough = (by_layer(row_lists(rows, frozenset({0, 1}), others, room)) for room in (100, 12))
    assert [3, 3, 2, 2, 2, 3] == [len(exact[local].places) for local in range(6)]
    assert [3, 4, 4, 4, 4, 4] == [len(rough[local].places) for local in range(6)]
    assert [3, 3, 0, 0, 0, 0] == [len(rough[local].counted) for local in range(6)]
    lists = row_lists(rows, frozenset({0, 1}), others, 12)
    assert 12 >= sum(len(one.places) for one in lists)


def test_where_rows_stand_in_a_list() -> None:
    """By their place among the step's; None if one is missing."""
    (one,) = row_lists(rows_with(False, True, True, True), frozenset({0}))
    found = one.find(np.array([1, 3]))
    assert found is not None
    assert [0, 2] == found.tolist()
    assert one.find(np.array([0, 1])) is None
    assert one.find(np.array([1, 4])) is None
