"""A client may name every layer and head that the model has, whatever its configuration says of them."""

from pathlib import Path

import pytest

from glassbox.config.load import GlassboxConfig
from glassbox.core.trace_options import OptionError
from glassbox.processes.api_server.intake import Intake
from glassbox.processes.api_server.measured_shape import MeasuredShape
from glassbox.store.snapshot import write_snapshot
from tests.export_samples import make_snapshot

# By the configuration: 4 layers, one of which runs twice, and 2 heads, of which a layer has 6.
SHAPE = (4, 2)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Of two pipeline stages; the second has the layer with most heads, and that of the highest number."""
    write_snapshot(tmp_path, make_snapshot(layers=(0, 1), num_layers_total=4))
    write_snapshot(tmp_path, make_snapshot(seed=1, layers=(2, 4), heads=6, num_layers_total=5))
    return tmp_path


def admit(intake: Intake, **asked: list[int]) -> None:
    """At both doors: the API's check, and the engine's."""
    keys = {"glassbox": "trace", **{f"glassbox_{name}": indices for name, indices in asked.items()}}
    intake.check(keys, SHAPE, is_chat=False)
    assert intake.admit(keys, SHAPE)


class TestBounds:
    def test_those_of_the_workers_count(self, run_dir: Path) -> None:
        """The layer that runs again, and the last head of the widest layer; not one more."""
        intake = Intake(GlassboxConfig, run_dir)
        admit(intake, layers=[0, 4], heads=[5])
        with pytest.raises(OptionError, match="glassbox_layers must be from 0 to 4, because this model has 5, got 5"):
            admit(intake, layers=[5])
        with pytest.raises(OptionError, match="glassbox_heads must be from 0 to 5, because this model has 6, got 6"):
            admit(intake, heads=[6])

    def test_before_a_worker_has_told_the_configuration_counts(self, tmp_path: Path) -> None:
        """It is asked again later."""
        intake = Intake(GlassboxConfig, tmp_path)
        with pytest.raises(OptionError, match="glassbox_layers must be from 0 to 3"):
            admit(intake, layers=[4])
        write_snapshot(tmp_path, make_snapshot(num_layers_total=5))
        admit(intake, layers=[4])

    def test_the_files_are_read_once(self, run_dir: Path) -> None:
        """Clients that ask for what there is not cost no reading each."""
        measured = MeasuredShape(run_dir)
        assert measured() == (5, 6)
        for path in run_dir.iterdir():
            path.unlink()
        assert measured() == (5, 6)
