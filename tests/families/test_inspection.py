"""`glassbox check --model` says of each family what a server of it observes, without serving it."""

from pathlib import Path
from typing import Any, Final

import pytest

from glassbox.adapter.model_inspection import inspect_model
from glassbox.config.load import packaged_config
from tests.families.family import Family
from tests.families.models import make_checkpoint
from tests.families.table import FAMILIES

pytestmark = [pytest.mark.integration, pytest.mark.families]

# Its names count attention modules alone.
_SHORT: Final = ("Zamba2",)


def _parameters() -> list[Any]:
    served = [family for family in FAMILIES if not family.unserved]
    return [
        pytest.param(family, id=family.name, marks=[] if family.name in _SHORT else [pytest.mark.slow])
        for family in served
    ]


@pytest.mark.parametrize("family", _parameters())
def test_layers_and_heads(family: Family, tmp_path: Path) -> None:
    """Those that `test_served_families.py` finds in the served model, and with them its time series."""
    make_checkpoint(family, tmp_path / "model")
    found = inspect_model(tmp_path / "model", packaged_config())
    assert family.observed == list(found.indices)
    bypassed = {bypass.slug: 0 for bypass in found.bypassed.values()}
    for bypass in found.bypassed.values():
        bypassed[bypass.slug] += 1
    assert {why.slug: count for why, count in family.bypassed.items()} == bypassed
    assert family.heads == list(found.heads)
