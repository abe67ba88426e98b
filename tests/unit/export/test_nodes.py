"""An engine over two nodes: each exports its part from its own run directory, and PromQL's sum is the whole."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from glassbox.config.load import GlassboxConfig
from glassbox.core.counters import ENGINE_NUMBERS, MergeRule
from glassbox.export.family_source import FamilySource
from glassbox.export.prometheus import to_metric
from glassbox.processes.exporter.sinks import Sinks
from glassbox.store.snapshot import Snapshot, write_snapshot
from tests.e2e.samples import Key, counts_against_rows, glassbox_samples
from tests.export_samples import changed, make_snapshot, of_layers, split_heads
from tests.otlp_receiver import OtlpReceiver, attributes

WHOLE = make_snapshot(layers=(0, 1, 2, 3), heads=4)
# Over the nodes of an engine; of TP nodes, which have the same layers, and of PP nodes, which have different ones.
OVER_TP_NODES = {
    MergeRule.SUM: sum,
    MergeRule.LARGEST_PLACE: max,
    MergeRule.LARGEST_LIVE: max,
    MergeRule.SUM_OF_STAGES: max,
    MergeRule.ALL_LIVE: min,
    MergeRule.NEWEST: max,
}
OVER_PP_NODES = {**OVER_TP_NODES, MergeRule.SUM_OF_STAGES: sum}
Join = Callable[[Sequence[float]], float]


def split_layers(snapshot: Snapshot, at: int) -> tuple[Snapshot, Snapshot]:
    """The snapshots of two pipeline stages that together measured what `snapshot` says."""
    nothing: dict[str, Any] = {"dropped_rows": {}, "errors": {}, "canary_rows": {}}
    stages = []
    for part, numbers in ((slice(None, at), {}), (slice(at, None), nothing)):
        num_layers = len(snapshot.layers[part])
        stage = {"instance": f"pp{part.start}", "layers_observed": num_layers}
        stages.append(of_layers(snapshot, part, layers_bypassed={"backend": num_layers - 1}, **stage, **numbers))
    return stages[0], stages[1]


def shown(run_dir: Path, *snapshots: Snapshot, detail: str = "layer") -> dict[Key, float]:
    """What a node exports from a directory in which its workers left these."""
    for snapshot in snapshots:
        write_snapshot(run_dir, snapshot)
    config = GlassboxConfig.model_validate({"export": {"prometheus": {"detail": detail}}})
    view = FamilySource(run_dir, lambda: config).view()
    return glassbox_samples(to_metric(family) for family in view.families)


def added(nodes: Sequence[dict[Key, float]], join: Join = sum) -> dict[Key, float]:
    """PromQL's `sum without (instance)`, or another."""
    return {key: join([node[key] for node in nodes if key in node]) for key in {key for node in nodes for key in node}}


def of_attention(samples: dict[Key, float]) -> dict[Key, float]:
    """Counters and histograms of rows."""
    return {key: value for key, value in samples.items() if "_attention_" in key[0] and key[0].endswith(SUFFIXES)}


SUFFIXES = ("_bucket", "_count", "_sum", "_rows_total")


@pytest.mark.parametrize("detail", ["model", "layer", "head"])
@pytest.mark.parametrize("split", [split_heads, split_layers])
def test_rows_count_once(tmp_path: Path, detail: str, split: Callable[..., tuple[Snapshot, Snapshot]]) -> None:
    """Every row, bucket and sum of the nodes adds up to what one node with all ranks would export."""
    first, second = split(WHOLE, 2)
    nodes = [shown(tmp_path / "a", first, detail=detail), shown(tmp_path / "b", second, detail=detail)]
    together = added([of_attention(node) for node in nodes])
    assert together == of_attention(shown(tmp_path / "whole", WHOLE, detail=detail))
    assert counts_against_rows(together) == {}


def test_a_head_is_on_one_node(tmp_path: Path) -> None:
    """At detail `head` the nodes have no series in common: a head belongs to a rank, and a rank to a node."""
    first, second = (
        {key for key in of_attention(shown(tmp_path / name, part, detail="head")) if "output_error" not in key[0]}
        for name, part in zip("ab", split_heads(WHOLE, 2), strict=True)
    )
    assert first
    assert not first & second


@pytest.mark.parametrize(
    ("split", "rules", "whole"),
    [
        (split_heads, OVER_TP_NODES, WHOLE),
        (split_layers, OVER_PP_NODES, changed(WHOLE, layers_bypassed={"backend": 2})),
    ],
)
def test_numbers_of_the_engine(
    tmp_path: Path, split: Callable[..., tuple[Snapshot, Snapshot]], rules: dict[MergeRule, Join], whole: Snapshot
) -> None:
    """What all ranks see alike is not added up: for each number, one aggregation over the nodes gives the engine's."""
    nodes = [shown(tmp_path / name, part) for name, part in zip("ab", split(whole, 2), strict=True)]
    expected = shown(tmp_path / "whole", whole)
    for entry in ENGINE_NUMBERS:
        name = f"glassbox_{entry.metric}"
        by_node = [{key: value for key, value in node.items() if key[0] == name} for node in nodes]
        assert added(by_node, rules[entry.merge]) == {key: expected[key] for key in expected if key[0] == name}, name


class TestWorkers:
    """`glassbox_worker_info` says of which ranks the numbers of a node are."""

    def labels(self, samples: dict[Key, float]) -> list[dict[str, str]]:
        found = [dict(key[1]) for key in samples if key[0] == "glassbox_worker_info"]
        assert [1.0] * len(found) == [value for key, value in samples.items() if key[0] == "glassbox_worker_info"]
        return found

    def test_rank_host_layers_and_heads(self, tmp_path: Path) -> None:
        """Of each worker of the node that runs; one that was restarted is there once."""
        _, second = split_heads(WHOLE, 2)
        second = changed(second, host="gpu-8")
        older = changed(second, instance="before", time_s=second.time_s - 60, start_time_s=second.start_time_s - 60)
        assert self.labels(shown(tmp_path, older, second)) == [
            {
                "model_name": "tiny/model",
                "engine": "0",
                "rank": "1",
                "host": "gpu-8",
                "layers": "0-3",
                "heads": "2-3",
            }
        ]

    def test_stages(self, tmp_path: Path) -> None:
        """Pipeline stages of one rank are told apart by their layers; together they are all."""
        found = self.labels(shown(tmp_path, *split_layers(WHOLE, 3)))
        assert {(one["rank"], one["layers"], one["heads"]) for one in found} == {
            ("0", "0-2", "0-3"),
            ("0", "3-3", "0-3"),
        }

    def test_nothing_observed(self, tmp_path: Path) -> None:
        """A worker without observed layers is there, without any."""
        idle = make_snapshot(layers=(), heads=0, total_heads=4)
        assert [(one["layers"], one["heads"]) for one in self.labels(shown(tmp_path, idle))] == [("", "")]


def test_otlp_names_the_node(tmp_path: Path) -> None:
    """Two nodes are two resources: own instance id, own host name, each worker with its rank and host."""
    sent = []
    for name, part in zip("ab", split_heads(WHOLE, 2), strict=True):
        with OtlpReceiver() as receiver:
            otel = {"enabled": True, "endpoint": receiver.grpc_endpoint}
            config = GlassboxConfig.model_validate({"export": {"otel": otel}})
            write_snapshot(tmp_path / name, part)
            sinks = Sinks(tmp_path / name, lambda config=config: config, {})  # type: ignore[misc]
            sinks.round()
            metrics = receiver.wait_for_metrics()
            sinks.close()
            (resource,) = receiver.requests[0].message.resource_metrics
        (point,) = metrics["glassbox.worker_info"].gauge.data_points
        sent.append((attributes(resource.resource.attributes), attributes(point.attributes)))
    (first, worker), (second, other) = sent
    assert first["service.instance.id"] != second["service.instance.id"]
    assert first["host.name"] == second["host.name"] != ""
    assert (worker["glassbox.rank"], worker["host.name"], worker["glassbox.heads"]) == (0, "gpu-7", "0-1")
    assert (other["glassbox.rank"], other["host.name"], other["glassbox.heads"]) == (1, "gpu-7", "2-3")
