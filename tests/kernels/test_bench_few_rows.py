"""The benchmark of few rows compares ways that find the same."""

import pytest

from tests.kernels.interpreter import DEVICE

# isort: split
from tests.bench.bench_few_rows import Model, Step, check, ways_of

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def test_every_way_adds_the_same() -> None:
    """Also those that the quick run leaves out."""
    step = Step(Model("tiny", 2, 4, 2, 64), 2, 40, DEVICE)
    ways = ways_of(step, quick=DEVICE == "cpu")
    check(step, ways)
    assert {"attention", "in line", "kept, not measured", "kept"} == {str(what["way"]) for what, _ in ways}
    with pytest.raises(RuntimeError, match=r"must have 2 rows, got \[1\]"):
        check(step, [({"way": "kept"}, step.kept(step.workspace(2), room=1))])
