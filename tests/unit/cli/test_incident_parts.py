"""The incident without its servers: broken models, the verdict, the table, and that only times are short."""

import io
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from glassbox.cli.dashboards.rule_model import RuleSettings
from glassbox.cli.demo import incident
from glassbox.cli.demo.faults import (
    FAULTS,
    make_variant,
    scale_tensor,
    scaled_queries,
    wrong_kv_scale,
    wrong_rope_theta,
)
from glassbox.cli.demo.incident import SHORT, choose, passed
from glassbox.cli.demo.incident_report import Outcome, Rows, alerts_text, finding, report
from glassbox.cli.demo.questions import NUMBER, questions
from glassbox.cli.demo.run import DemoError
from glassbox.cli.main import main
from glassbox.core.statistics import INDEX
from glassbox.signals.baseline import from_engines
from glassbox.signals.drift_watch import COMPARED
from glassbox.store.merge import merge
from tests.export_samples import make_snapshot

torch = pytest.importorskip("torch", reason="makes models")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="makes models")

# What may be shortened: durations, and how many evaluations a history must have.
TIMES = {
    *("window", "window_interval", "history", "history_offset", "history_interval", "min_history"),
    *("sampling_window", "hold"),
}


@pytest.fixture
def healthy_model(tmp_path: Path) -> Path:
    """A folder like the demo's model: two layers' query weights, a config, a tokenizer."""
    folder = tmp_path / "healthy"
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    names = [f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in (11, 12) for part in "qk"]
    weights = {name: torch.randn(6, 5, generator=generator).bfloat16() for name in names}
    safetensors_torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"num_hidden_layers": 3, "rope_parameters": {"rope_theta": 100000.0}}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


class TestModels:
    def test_scaled_queries_changes_one_tensor(self, healthy_model: Path, tmp_path: Path) -> None:
        """Exactly four times as large, in bfloat16; the healthy file is untouched; the rest are links."""
        before = safetensors_torch.load_file(healthy_model / "model.safetensors")
        scaled_queries(healthy_model, tmp_path / "broken")
        after = safetensors_torch.load_file(tmp_path / "broken/model.safetensors")
        changed = "model.layers.12.self_attn.q_proj.weight"
        assert before.keys() == after.keys()
        for name in before:
            assert torch.equal(before[name] * (4 if name == changed else 1), after[name]), name
        healthy = safetensors_torch.load_file(healthy_model / "model.safetensors")
        assert all(torch.equal(before[name], healthy[name]) for name in before)
        assert (tmp_path / "broken/tokenizer.json").is_symlink()

    def test_scale_tensor_names_what_it_needs(self, healthy_model: Path) -> None:
        """Another model, or one of another type."""
        with pytest.raises(ValueError, match=r"model\.safetensors must have a bfloat16 tensor nope, got None"):
            scale_tensor(healthy_model / "model.safetensors", "nope", 2.0)

    def test_wrong_rope_theta(self, healthy_model: Path, tmp_path: Path) -> None:
        """Only that number of the configuration."""
        wrong_rope_theta(healthy_model, tmp_path / "broken")
        text = (tmp_path / "broken/config.json").read_text()
        assert '{"num_hidden_layers": 3, "rope_parameters": {"rope_theta": 10000.0}}' == text
        assert (tmp_path / "broken/model.safetensors").resolve() == healthy_model / "model.safetensors"

    def test_wrong_kv_scale(self, healthy_model: Path, tmp_path: Path) -> None:
        """A scale of keys and values for each layer, in a file beside the linked weights."""
        wrong_kv_scale(healthy_model, tmp_path / "broken")
        scales = safetensors_torch.load_file(tmp_path / "broken/kv_scales.safetensors")
        names = {f"model.layers.{n}.self_attn.{part}_scale" for n in range(3) for part in "kv"}
        assert names == scales.keys()
        assert 0.004 == pytest.approx(scales["model.layers.2.self_attn.k_scale"].item())
        assert '"kv_cache_scheme"' in (tmp_path / "broken/config.json").read_text()

    def test_a_variant_has_all_files(self, healthy_model: Path, tmp_path: Path) -> None:
        """Except those that are to be replaced."""
        make_variant(healthy_model, tmp_path / "broken", "config.json")
        assert {"model.safetensors", "tokenizer.json"} == {path.name for path in (tmp_path / "broken").iterdir()}


class TestRequests:
    def test_held_out_subjects_are_others(self) -> None:
        """No request is in both sets, and there are as many tasks of each kind."""
        sets = [{request.name for request in questions(held_out=held_out)} for held_out in (0, 1)]
        assert set() == sets[0] & sets[1]
        assert [NUMBER, NUMBER] == [len(names) for names in sets]

    def test_bare_prompts_have_no_messages(self) -> None:
        """The same texts, as plain completions."""
        chat, bare = (questions(held_out=True, bare=bare)[0] for bare in (False, True))
        assert bare.body["prompt"] == chat.body["messages"][0]["content"]


class TestRules:
    def test_only_times_are_shortened(self) -> None:
        """Every threshold is the shipped one."""
        shipped, short = asdict(RuleSettings()), asdict(SHORT)
        assert {name for name in shipped if shipped[name] != short[name]} <= TIMES

    def test_each_fault_has_an_alert_about_attention(self) -> None:
        """One that exists, and a job name of its own."""
        assert {fault.alert for fault in FAULTS} <= set(incident._attention_alerts())
        assert len(FAULTS) == len({fault.name for fault in FAULTS})


HEALTHY = Outcome("healthy", "nothing", None)
BROKEN = Outcome("f", "broken", "SinkLost", fired={"Drift": 5.0, "SinkLost": 7.5}, rows={"Drift": 10, "SinkLost": 2000})


class TestVerdict:
    @pytest.mark.parametrize(
        ("outcomes", "expected"),
        [
            ([HEALTHY], True),
            ([HEALTHY, BROKEN], True),
            ([replace(HEALTHY, fired={"Drift": 3.0}), BROKEN], False),
            ([HEALTHY, replace(BROKEN, fired={"Drift": 5.0})], False),
            ([HEALTHY, replace(BROKEN, fired={})], False),
            ([HEALTHY, replace(BROKEN, fired={"SinkLost": 1.0, "EntropyCollapse": 2.0})], False),
            ([HEALTHY, replace(BROKEN, fired={"SinkLost": 1.0, "Saturation": 2.0})], True),
            ([HEALTHY, Outcome("g", "x", "Drift", skipped="no AVX-512")], True),
        ],
    )
    def test_passed(self, outcomes: list[Outcome], expected: bool) -> None:
        """The healthy model none; each fault its own, and no other critical one."""
        assert expected is passed(outcomes)

    def test_choose(self) -> None:
        """By name, all without one; an unknown name is told with the known ones."""
        assert FAULTS == choose([])
        assert ["kv-scale"] == [fault.name for fault in choose(["kv-scale", "kv-scale"])]
        with pytest.raises(DemoError, match=r"--fault must be one of rope-theta, .*, got nope"):
            choose(["nope"])


class TestTable:
    def outcome(self, alert: str) -> Outcome:
        """A fault in decode rows of layer 1, head 0: half the sink, and another distribution of the entropy."""
        before, now = make_snapshot(seed=1), make_snapshot(seed=1)
        for snapshot in (before, now):
            snapshot.counts[:] *= 100
            snapshot.sums[..., INDEX["sink_ratio"]] = 0.8 * snapshot.counts[..., INDEX["sink_ratio"], :].sum(axis=-1)
        now.sums[1, :, 1, INDEX["sink_ratio"]] /= 2
        number = now.counts[1, 0, 1, INDEX["entropy_ratio"]].sum()
        now.counts[1, 0, 1, INDEX["entropy_ratio"]] = 0
        now.counts[1, 0, 1, INDEX["entropy_ratio"], 3] = number
        rows = [Rows.of(merge([snapshot])) for snapshot in (before, now)]
        return Outcome(
            "f",
            "broken",
            alert,
            measured=rows[1],
            healthy=replace(HEALTHY, measured=rows[0]),
            baseline=from_engines(merge([before]), "a test"),
        )

    def test_a_lost_sink_is_shown_where_it_is_lost(self) -> None:
        """The layer with the lowest ratio, and its means."""
        found = finding(self.outcome("SinkLost"))
        assert found is not None
        assert ("sink_ratio", "decode", 1, None) == (found.statistic, found.phase, found.layer, found.head)
        assert (0.8, 0.4) == (pytest.approx(found.before), pytest.approx(found.now))
        assert "sink_ratio, decode, layer 1: 0.800 -> 0.400" == str(found)

    def test_drift_is_shown_at_its_worst_head(self) -> None:
        """With the index that the metric has."""
        found = finding(self.outcome("Drift"))
        assert found is not None
        assert ("entropy_ratio", "decode", 1, 0) == (found.statistic, found.phase, found.layer, found.head)
        assert found.index is not None
        assert found.index > 1
        assert f"(index {found.index:.2f})" in str(found)

    def test_rows_of_a_time(self) -> None:
        """What came since; means per head as sums say."""
        snapshot = make_snapshot()
        rows = Rows.of(merge([snapshot]))
        assert rows is not None
        assert 0 == rows.since(rows).counts.sum()
        column = INDEX["entropy_ratio"]
        expected = snapshot.sums[0, 1, 0, column] / snapshot.counts[0, 1, 0, column].sum()
        assert expected == rows.head_means("entropy_ratio")[0, 1, 0]
        assert Rows.of([]) is None

    def test_the_fault_s_alert_comes_first(self) -> None:
        """With seconds and rows; then the others; or that it didn't."""
        assert "SinkLost: 8 s, 2,000 rows\nDrift: 5 s, 10 rows" == alerts_text(BROKEN)
        assert "SinkLost did not fire\nDrift: 5 s, 10 rows" == alerts_text(replace(BROKEN, fired={"Drift": 5.0}))
        assert "none" == alerts_text(HEALTHY)
        assert "left out: no AVX-512" == alerts_text(replace(BROKEN, skipped="no AVX-512"))

    def test_everything_is_in_the_table(self) -> None:
        """Fault, answer, finding, alerts; an empty answer is said to be one."""
        console = Console(width=140, record=True, file=io.StringIO())
        console.print(report([HEALTHY, replace(self.outcome("Drift"), fired={"Drift": 5.0}, rows={"Drift": 7})]))
        text = console.export_text()
        for part in ("healthy", "broken", "(an empty answer)", "Drift: 5 s, 7 rows", "none"):
            assert part in text

    def test_every_counting_statistic_is_compared(self) -> None:
        """The alert's statistics are among those that have an index."""
        assert set(RuleSettings().drift_statistics) <= {statistic.name for statistic in COMPARED}


class TestCommand:
    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["--fault", "kv-scale"], "--fault is for the incident; add --incident"),
            (["--incident", "--once"], "leave out --once and --port"),
            (["--incident", "--fault", "nope"], "--fault must be one of rope-theta, kv-scale"),
        ],
    )
    def test_options_that_do_not_go_together(self, arguments: list[str], expected: str) -> None:
        """One line, before anything is started."""
        result = CliRunner().invoke(main, ["demo", *arguments])
        assert (1, 1) == (result.exit_code, len(result.stderr.splitlines()))
        assert expected in result.stderr

    def test_no_prometheus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One line with the remedy, before anything is started."""
        monkeypatch.setattr(incident, "PROMETHEUS", None)
        result = CliRunner().invoke(main, ["demo", "--incident"])
        assert (1, 1) == (result.exit_code, len(result.stderr.splitlines()))
        assert "needs the program prometheus on PATH; on Debian: apt-get install prometheus" in result.stderr


def test_arrays_are_those_of_the_engine() -> None:
    """Rows are taken as they are, without a copy that could differ."""
    engine = merge([make_snapshot()])[0]
    rows = Rows.of([engine])
    assert rows is not None
    np.testing.assert_array_equal(engine.counts, rows.counts)
