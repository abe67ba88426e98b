"""What a worker keeps of requests that the trace rate chooses follows the YAML and the probes' files."""

import logging
from pathlib import Path
from typing import Any

import pytest

from glassbox.config.load import GlassboxConfig
from glassbox.core.errors import ErrorCounter
from glassbox.core.trace_options import TraceOptions
from glassbox.processes.worker.traces.sampled import SampledOptions
from glassbox.signals.probe import ProbeFeature
from tests import probe_samples
from tests.trace_samples import make_host

OTHER = (ProbeFeature("answer_entropy_ratio_L3_H1", 0.5, 0.2, 1.0),)


class Worker:
    """Options of a worker with layers 0 to 3 of two heads each."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self.errors = ErrorCounter(logging.getLogger("test.sampled"))
        config = lambda: GlassboxConfig.model_validate(self.settings)  # noqa: E731
        self.sampled = SampledOptions(config, make_host(layers=(0, 1, 2, 3)), self.errors)

    def options(self) -> TraceOptions:
        self.sampled.refresh()
        return self.sampled.options


def test_follows_the_yaml_and_the_files(tmp_path: Path) -> None:
    """A probe that comes, is replaced, breaks and goes; what was read last stays in force, and it is counted once."""
    worker = Worker()
    assert TraceOptions() == worker.options()
    path = probe_samples.write(tmp_path)
    worker.settings["probes"] = [{"file": str(path)}]
    assert TraceOptions(layers=(0,), heads=(0, 1)) == worker.options()
    probe_samples.write(tmp_path, features=OTHER)
    for content in (path.read_text(), "{", None):
        if content is None:
            path.unlink()
        else:
            path.write_text(content)
        assert TraceOptions(layers=(3,), heads=(1,)) == worker.options() == worker.options()
    assert {"probes": 2} == worker.errors.counts()
    worker.settings = {"requests": {"signals": ["rauq"]}}
    assert TraceOptions(signals=("rauq",)) == worker.options()


def test_a_probe_of_another_model_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once, with what it needs; requests are traced all the same."""
    worker = Worker()
    features = (ProbeFeature("answer_entropy_ratio_L9_H1", 0.5, 0.2, 1.0),)
    worker.settings["probes"] = [{"file": str(probe_samples.write(tmp_path, features=features))}]
    with caplog.at_level(logging.WARNING, "glassbox.processes.worker.traces.sampled"):
        for _ in range(3):
            assert TraceOptions(layers=(9,), heads=(1,)) == worker.options()
    (told,) = {id(record): record.getMessage() for record in caplog.records}.values()
    assert "features must be of layers that tiny/model measures (0 to 3), got layer 9" in told


def test_layers_of_other_stages(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are the model's, too: nothing is told."""
    path = probe_samples.write(tmp_path, features=OTHER)
    config = GlassboxConfig.model_validate({"probes": [{"file": str(path)}]})
    errors = ErrorCounter(logging.getLogger("test.sampled"))
    SampledOptions(lambda: config, make_host(layers=(0, 1)), errors, elsewhere=frozenset({2, 3})).refresh()
    assert [] == caplog.records
