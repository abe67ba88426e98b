"""A program: two workers of a glassbox whose table of engine numbers has one entry more, and who shows it.

The entry is added before any module that follows the table is loaded, as if it stood in `core/counters.py`. Nothing
else here is about that counter but the line that counts it. Arguments: a folder, and the counter's own label or "".
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from glassbox.core import counters

FOLDER, LABEL = Path(sys.argv[1]), sys.argv[2]
ENTRY = counters.EngineNumber(
    name="late_steps",
    metric="late_steps_total",
    otel_name="late_steps",
    kind="counter",
    unit="{step}",
    help="Steps that came late.",
    merge=counters.MergeRule.SUM,
    labels=(LABEL,) if LABEL else (),
    page=99,
)
counters.ENGINE_NUMBERS += (ENTRY,)
counters.ENGINE_NUMBER[ENTRY.name] = ENTRY

import numpy as np  # noqa: E402  # the table is complete only now
from prometheus_client import CollectorRegistry, generate_latest  # noqa: E402

from glassbox.adapter.layers import GlobalHeads  # noqa: E402
from glassbox.config.load import GlassboxConfig  # noqa: E402
from glassbox.core.accumulator_arrays import ARRAY, AccumulatorArrays  # noqa: E402
from glassbox.core.errors import export_errors  # noqa: E402
from glassbox.core.logs import get_logger  # noqa: E402
from glassbox.core.statistics import STATISTICS, Phase  # noqa: E402
from glassbox.export.family_source import FamilySource  # noqa: E402
from glassbox.export.prometheus import PrometheusCollector  # noqa: E402
from glassbox.processes.worker.adapters import AdapterSlots  # noqa: E402
from glassbox.processes.worker.nonfinite import NonfiniteWatch  # noqa: E402
from glassbox.processes.worker.observer import Counters  # noqa: E402
from glassbox.processes.worker.worker import Worker  # noqa: E402
from glassbox.store.merge import merge  # noqa: E402
from glassbox.store.snapshot import read_snapshots, write_snapshot  # noqa: E402
from glassbox.web.live_snapshot import engine_answer, snapshot_answer  # noqa: E402
from glassbox.web.matrices import between  # noqa: E402
from glassbox.web.selection import Selection  # noqa: E402
from tests.canaries import QuietCanary, make_place  # noqa: E402

CONFIG = GlassboxConfig()
ALL = Selection(STATISTICS[:1], (Phase.DECODE,))


def worker(rank: int) -> Any:
    """A worker without a vLLM: what `snapshot()` asks of its parts, for one layer with one of two heads."""
    arrays = AccumulatorArrays(**{name: entry.empty(1, 1) for name, entry in ARRAY.items()})
    made = object.__new__(Worker)
    vars(made).update(
        _instance=f"rank{rank}",
        _start_time_s=0.0,
        _errors=export_errors(get_logger("glassbox.tests")),
        _settings=SimpleNamespace(status=SimpleNamespace(successful=True, timestamp_s=1.0), config=CONFIG),
        _requests=SimpleNamespace(counts=lambda: ({}, {}), active=tuple),
        _facts=SimpleNamespace(
            server=SimpleNamespace(model_name="tiny/model", engine="0", rank=rank, num_heads=2, num_layers=1),
            layers=SimpleNamespace(indices=(0,), names=("a",), heads=(1,), bypassed={}, num_heads=1),
        ),
        _traces=SimpleNamespace(dropped=0, watched_delay_s=0.0),
        _heads=GlobalHeads((rank,), 2),
        _place=make_place((0,)),
        _canary=QuietCanary((0,)),
        _nonfinite=NonfiniteWatch((0,)),
        _build={"version": "1", "vllm_version": "2", "backend": "CPU_ATTN"},
        observer=SimpleNamespace(
            counters=Counters(),
            adapters=AdapterSlots(0),
            effective_sample_rate=1.0,
            sampled_layers=(0,),
            measurer=SimpleNamespace(copy=lambda now_s: arrays),
        ),
    )
    return made


def count(of: Any, steps: int) -> None:
    """The line that counts it."""
    if LABEL:
        of.observer.counters.late_steps["slow"] += steps
    else:
        of.observer.counters.late_steps += steps


def write(workers: list[Any]) -> list[Path]:
    return [write_snapshot(FOLDER, each.snapshot()) for each in workers]


def number_in(path: Path) -> Any:
    with np.load(path) as archive:
        return json.loads(bytes(archive["meta"]))["numbers"][ENTRY.name]


def main() -> None:
    workers = [worker(0), worker(1)]
    write(workers)
    [before] = merge(read_snapshots(FOLDER))
    for each, steps in zip(workers, (3, 4), strict=True):
        count(each, steps)
    paths = write(workers)
    [after] = merge(read_snapshots(FOLDER))
    source = FamilySource(FOLDER, lambda: CONFIG)
    registry = CollectorRegistry()
    registry.register(PrometheusCollector(source))
    text = generate_latest(registry).decode()
    result = {
        "files": [number_in(path) for path in paths],
        "before": before.numbers[ENTRY.name],
        "merged": after.numbers[ENTRY.name],
        "metrics": [line for line in text.splitlines() if "late_steps" in line],
        "page": json.loads(snapshot_answer(source, ALL))["engines"][0][ENTRY.name],
        "interval": engine_answer(between(before, after), ALL, CONFIG)[ENTRY.name],
    }
    print(f"RESULT {json.dumps(result)}")


main()
