"""`glassbox.capture` of a model that can't be captured says so before anything is generated."""

from pathlib import Path
from typing import Any

import pytest

from glassbox import capture
from glassbox.store import rundir
from glassbox.store.snapshot import write_snapshot
from tests.export_samples import make_snapshot

NO_ENGINE: Any = None  # it must not come to that


@pytest.mark.parametrize(
    ("bypassed", "why"),
    [
        ({"backend": 2, "encoder": 1, "mask": 0}, "backend: its attention backend is not one that glassbox wraps; enc"),
        ({}, "it has none"),
    ],
)
def test_nothing_is_observed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bypassed: dict[str, int], why: str
) -> None:
    """The reasons are those of its layers."""
    monkeypatch.setenv(rundir.RUN_DIR_ENV, str(tmp_path))
    write_snapshot(tmp_path, make_snapshot(layers=(), heads=0, total_heads=4, layers_bypassed=bypassed))
    with pytest.raises(RuntimeError, match=r"no attention layer of tiny/model is observed \(" + why):
        capture(NO_ENGINE, ["hello"])
