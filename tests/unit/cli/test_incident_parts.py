"""The incident without its servers: broken models, the verdict, the table, and that only times are short."""

import io
import sys
from dataclasses import asdict, replace
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from glassbox.cli.dashboards.rule_model import RuleSettings
from glassbox.cli.demo import incident
from glassbox.cli.demo.broken_kernel import break_kernel, breaking, plugin_environment, register
from glassbox.cli.demo.faults import (
    FAULTS,
    make_variant,
    scale_tensor,
    scaled_queries,
    wrong_key_scale,
    wrong_rope_theta,
    wrong_value_scale,
)
from glassbox.cli.demo.incident import SHORT, choose, passed
from glassbox.cli.demo.incident_report import Outcome, Rows, alerts_text, finding, report
from glassbox.cli.demo.questions import NUMBER, questions
from glassbox.cli.demo.run import DemoError
from glassbox.cli.main import main
from glassbox.core.output_checks import LayerChecks, LayerState
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

    def test_wrong_key_scale(self, healthy_model: Path, tmp_path: Path) -> None:
        """A scale of keys and values for each layer, in a file beside the linked weights."""
        wrong_key_scale(healthy_model, tmp_path / "broken")
        scales = safetensors_torch.load_file(tmp_path / "broken/kv_scales.safetensors")
        names = {f"model.layers.{n}.self_attn.{part}_scale" for n in range(3) for part in "kv"}
        assert names == scales.keys()
        assert [0.004, 1.0] == [pytest.approx(scales[f"model.layers.2.self_attn.{part}_scale"].item()) for part in "kv"]
        assert '"kv_cache_scheme"' in (tmp_path / "broken/config.json").read_text()

    def test_wrong_value_scale(self, healthy_model: Path, tmp_path: Path) -> None:
        """Likewise, and keys have all the range that they need."""
        wrong_value_scale(healthy_model, tmp_path / "broken")
        scales = safetensors_torch.load_file(tmp_path / "broken/kv_scales.safetensors")
        assert [1.0, 0.004] == [pytest.approx(scales[f"model.layers.0.self_attn.{part}_scale"].item()) for part in "kv"]

    def test_a_variant_has_all_files(self, healthy_model: Path, tmp_path: Path) -> None:
        """Except those that are to be replaced."""
        make_variant(healthy_model, tmp_path / "broken", "config.json")
        assert {"model.safetensors", "tokenizer.json"} == {path.name for path in (tmp_path / "broken").iterdir()}


class TestBrokenKernel:
    def test_one_head_of_one_layer_from_the_moment_on(self) -> None:
        """10 % too large; all else is what the kernel gives, whatever form its output has."""
        broken = [False]
        forward = breaking(lambda _impl, _layer, output: output.clone(), lambda: broken[0])
        impl = SimpleNamespace(num_heads=6)
        served = torch.ones(2, 6 * 4)

        def head_sums(layer: int, output: Any) -> list[float]:
            of_layer = SimpleNamespace(layer_name=f"model.layers.{layer}.self_attn.attn")
            return [round(x, 3) for x in forward(impl, of_layer, output).view(2, 6, 4).sum((0, 2)).tolist()]

        assert [8.0] * 6 == head_sums(12, served)
        broken[0] = True
        assert [8.0] * 6 == head_sums(11, served) == head_sums(2, served)
        assert [8.0, 8.0, 8.0, 8.0, 8.8, 8.0] == head_sums(12, served) == head_sums(12, served.view(2, 6, 4))

    def test_it_is_a_plugin_of_one_server(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """vLLM finds it where that server's Python looks for modules, before what is there already."""
        monkeypatch.setenv("PYTHONPATH", "/elsewhere")
        env = plugin_environment(tmp_path / "kernel")
        assert f"{tmp_path / 'kernel'}:/elsewhere" == env["PYTHONPATH"]
        (found,) = distributions(path=[str(tmp_path / "kernel")])
        (entry_point,) = found.entry_points
        assert "vllm.general_plugins" == entry_point.group
        assert register is entry_point.load()

    def test_nobody_else_has_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without the server's environment nothing is wrapped."""
        monkeypatch.delenv("GLASSBOX_DEMO_BROKEN_KERNEL", raising=False)
        monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.cpu_attn", None)
        register()

    def test_the_moment(self, tmp_path: Path) -> None:
        """The file that the server looks for."""
        env = plugin_environment(tmp_path / "kernel")
        switch = Path(env["GLASSBOX_DEMO_BROKEN_KERNEL"] or "")
        assert not switch.exists()
        break_kernel(tmp_path / "kernel")
        assert switch.exists()


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
        assert float(found.note.removeprefix("index ")) > 1
        assert str(found).endswith(f"({found.note})")

    def of_checks(self, alert: str, before: LayerChecks, now: LayerChecks) -> str:
        """What is shown of a fault that checks have found."""
        outcome = self.outcome(alert)
        assert outcome.measured is not None
        assert outcome.healthy is not None
        assert outcome.healthy.measured is not None
        healthy = replace(outcome.healthy, measured=replace(outcome.healthy.measured, checks=before))
        return str(finding(replace(outcome, measured=replace(outcome.measured, checks=now), healthy=healthy)))

    def test_a_wrong_output_is_shown_where_it_is_worst(self) -> None:
        """Of the layers that failed; one that is near the limit is none of them."""
        before, now = LayerChecks.nothing(2), LayerChecks.nothing(2)
        before.worst_ratio[:] = 0.3
        now.worst_ratio[:], now.worst_head[:] = (0.9, 28.4), (1, 4)
        assert "None" == self.of_checks("OutputWrong", before, now)
        now.state[1] = LayerState.FAILED
        expected = "output error, layer 1 head 4: 0.300 -> 28.4 (1 is what rounding explains)"
        assert expected == self.of_checks("OutputWrong", before, now)

    def test_a_lossy_cache_is_shown_where_it_loses_most(self) -> None:
        """Keys or values, the error and what is cut off."""
        before, now = LayerChecks.nothing(2), LayerChecks.nothing(2)
        assert "None" == self.of_checks("KvCacheQuantization", before, now)
        before.kv_error[:], now.kv_error[:] = 0.0, [[0.02, 0.03], [0.02, 0.46]]
        now.kv_saturated[:] = [[0.0, 0.0], [0.0, 0.285]]
        expected = "cache error of values, layer 1: 0.000 -> 0.460 (28% cut off)"
        assert expected == self.of_checks("KvCacheQuantization", before, now)

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
