"""The generated dashboards: complete, readable by Grafana, and asking only for what exists."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("grafana_foundation_sdk", reason="needs the extra dashboards")

from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from glassbox.cli.dashboards import check, generated, metrics_reference, panels, promql
from glassbox.cli.dashboards.layout import GRID_COLUMNS
from glassbox.cli.dashboards.rules import build_groups
from glassbox.core.statistics import STATISTICS
from glassbox.export.families import METRICS
from glassbox.export.prometheus import bucket_names

ROOT = Path(__file__).resolve().parents[3]
BOARDS = generated.dashboards()
UIDS = ("glassbox-overview", "glassbox-fleet", "glassbox-heads", "glassbox-requests")
EXPORTED = [statistic for statistic in STATISTICS if statistic.exported]
# Of Grafana's value formats (packages/grafana-data/src/valueFormats/categories.ts), those that a linter accepts.
UNITS = {"none", "short", "percentunit", "cps", "dateTimeFromNow", "s"}
Board = dict[str, Any]


def all_panels() -> list[Any]:
    return [
        pytest.param(board, panel, id=f"{uid}: {panel['title']}")
        for uid, board in BOARDS.items()
        for panel in check.panels(board)
    ]


def all_targets() -> list[Any]:
    return [
        pytest.param(panel, target, id=f"{uid}: {panel['title']} {target['refId']}")
        for uid, board in BOARDS.items()
        for panel in check.panels(board)
        for target in panel.get("targets", ())
    ]


def all_boards() -> list[Any]:
    return [pytest.param(board, id=uid) for uid, board in BOARDS.items()]


def variable(board: Board, name: str) -> dict[str, Any]:
    return next(entry for entry in board["templating"]["list"] if entry["name"] == name)


class TestFiles:
    def test_committed_files_are_what_the_code_makes(self) -> None:
        """`glassbox dashboards --check` finds nothing."""
        assert [] == generated.stale(ROOT)

    def test_command_writes_then_finds_everything_up_to_date(self, tmp_path: Path) -> None:
        """A fresh directory gets all files; --check passes there; a changed, a missing and a strange file fail it."""
        command = [sys.executable, "-m", "glassbox.cli.dashboards", "--out", str(tmp_path)]
        wrote = subprocess.run(command, capture_output=True, text=True, check=True)
        assert f"{len(generated.render())} of {len(generated.render())} files written" in wrote.stdout
        checked = subprocess.run([*command, "--check"], capture_output=True, text=True, check=True)
        assert f"{len(generated.render())} files are up to date" in checked.stdout
        (tmp_path / "dashboards/glassbox-heads.json").write_text("{}")
        (tmp_path / "deploy/prometheus/rules.yaml").unlink()
        (tmp_path / "dashboards/other.json").write_text("{}")
        failed = subprocess.run([*command, "--check"], capture_output=True, text=True, check=False)
        assert 1 == failed.returncode
        assert [
            f"glassbox: {tmp_path}/dashboards/glassbox-heads.json is stale; run `glassbox dashboards`",
            f"glassbox: {tmp_path}/deploy/prometheus/rules.yaml is missing; run `glassbox dashboards`",
            f"glassbox: {tmp_path}/dashboards/other.json is not generated; remove it",
        ] == failed.stderr.splitlines()

    def test_a_second_run_writes_nothing(self, tmp_path: Path) -> None:
        """Generation is deterministic: same text, and no file is touched."""
        assert len(generated.render()) == len(generated.write(tmp_path))
        assert [] == generated.write(tmp_path)

    @pytest.mark.parametrize("uid", UIDS)
    def test_dashboard_is_small_enough_for_a_config_map(self, uid: str) -> None:
        """kubectl's client-side apply keeps a second copy in an annotation of at most 256 KiB."""
        assert 200 * 1024 > (ROOT / f"dashboards/{uid}.json").stat().st_size


class TestSchema:
    @pytest.mark.parametrize("uid", UIDS)
    def test_loads_into_grafanas_types_without_loss(self, uid: str) -> None:
        """The committed file, read into the SDK's models of Grafana's schema and written again, is the same."""
        plugins.register_default_plugins()
        committed = json.loads((ROOT / f"dashboards/{uid}.json").read_text())
        again = json.loads(json.dumps(Dashboard.from_json(committed), cls=JSONEncoder))
        assert committed == again

    @pytest.mark.parametrize("board", all_boards())
    def test_identity(self, board: Board) -> None:
        """Classic JSON of schema 39, without the number and data source of one Grafana: it can be imported anywhere."""
        assert 39 == board["schemaVersion"]
        assert board["uid"] in UIDS
        assert ["vllm", "glassbox"] == board["tags"]
        assert "id" not in board
        assert "__inputs" not in board

    @pytest.mark.parametrize("board", all_boards())
    def test_panels_have_their_own_place_and_number(self, board: Board) -> None:
        """No two panels overlap or share an id, none reaches beyond the grid; folded rows hold their panels."""
        ids: list[int] = []
        cells: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            ids.append(panel["id"])
            ids += [inner["id"] for inner in panel.get("panels", ())]
            position = panel["gridPos"]
            place = {
                (x, y)
                for x in range(position["x"], position["x"] + position["w"])
                for y in range(position["y"], position["y"] + position["h"])
            }
            assert position["x"] + position["w"] <= GRID_COLUMNS
            assert not place & cells, panel["title"]
            cells |= place
            if panel["type"] == "row":
                assert panel["collapsed"] == bool(panel["panels"])
        assert len(ids) == len(set(ids))

    def test_health_tiles_come_first(self) -> None:
        """An SRE sees alerts, non-finite rows, configuration, errors, coverage and overhead in the first line."""
        first = sorted(
            (panel for panel in BOARDS["glassbox-overview"]["panels"] if panel["gridPos"]["y"] == 1),
            key=lambda panel: panel["gridPos"]["x"],
        )
        names = ["Alerts firing", "Non-finite rows", "Configuration", "Errors", "Layers observed", "Overhead"]
        assert names == [panel["title"] for panel in first]
        assert {"stat"} == {panel["type"] for panel in first}


class TestLinterRules:
    """The rules of Grafana's dashboard-linter, by their names there."""

    @pytest.mark.parametrize("board", all_boards())
    def test_template_datasource_rule(self, board: Board) -> None:
        """One variable for the data source, called so and labelled so, of kind Prometheus."""
        sources = [entry for entry in board["templating"]["list"] if entry["type"] == "datasource"]
        expected = [("datasource", "Data source", "prometheus")]
        assert expected == [(entry["name"], entry["label"], entry["query"]) for entry in sources]

    @pytest.mark.parametrize("name", ["job", "instance"])
    @pytest.mark.parametrize("board", all_boards())
    def test_template_job_and_instance_rules(self, board: Board, name: str) -> None:
        """Queried from the chosen data source, several values at once, "all" is a non-empty value."""
        entry = variable(board, name)
        assert ("query", name.capitalize(), True, True, ".+") == tuple(
            entry[key] for key in ("type", "label", "multi", "includeAll", "allValue")
        )
        assert "${datasource}" == entry["datasource"]["uid"]

    @pytest.mark.parametrize("board", all_boards())
    def test_template_on_time_change_reload_rule(self, board: Board) -> None:
        """Queried variables follow the time range."""
        assert {2} == {entry["refresh"] for entry in board["templating"]["list"] if entry["type"] == "query"}

    @pytest.mark.parametrize("board", all_boards())
    def test_template_label_promql_rule(self, board: Board) -> None:
        """Queried variables ask label_values of an existing metric for an existing label, narrowed by those before."""
        known = check.known_series(build_groups())
        for entry in board["templating"]["list"]:
            if entry["type"] != "query":
                continue
            match = re.fullmatch(r"label_values\((.+), (\w+)\)", entry["query"]["query"])
            assert match, entry["query"]
            assert match[2] == entry["name"]
            assert [] == check.problems_of(match[1], entry["name"], known)
            assert match[2] in known["glassbox_steps_total"]

    @pytest.mark.parametrize(("board", "panel"), all_panels())
    def test_panel_title_description_rule(self, board: Board, panel: Board) -> None:
        """Every panel says what it is and what to see in it."""
        assert panel["title"]
        assert 20 < len(panel["description"]), board["uid"]

    @pytest.mark.parametrize(("board", "panel"), all_panels())
    def test_panel_units_rule(self, board: Board, panel: Board) -> None:
        """Every panel with numbers has a unit that Grafana knows."""
        if panel["type"] != "text":
            assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, board["uid"]

    @pytest.mark.parametrize(("board", "panel"), all_panels())
    def test_panel_datasource_rule(self, board: Board, panel: Board) -> None:
        """Panel and targets use the chosen data source."""
        if panel["type"] != "text":
            sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
            assert {("prometheus", "${datasource}")} == {(source["type"], source["uid"]) for source in sources}
            assert panel["targets"], board["uid"]

    @pytest.mark.parametrize(("panel", "target"), all_targets())
    def test_target_job_and_instance_rules(self, panel: Board, target: Board) -> None:
        """Every selector follows all four variables; where one model is chosen, its value is one, too. A metric that is
        a server's follows the two that it has."""
        assert panel["targets"]
        expression = target["expr"]
        of_server = {family.name for family in METRICS if "engine" not in family.label_names}
        asked = [metric for metric, _ in check.selectors(expression)]
        assert sum(metric not in of_server for metric in asked) == expression.count(promql.MATCHERS)
        assert len(asked) == expression.count(promql.SERVER_MATCHERS)

    @pytest.mark.parametrize(("panel", "target"), all_targets())
    def test_target_rate_interval_rule(self, panel: Board, target: Board) -> None:
        """Every range is $__rate_interval."""
        assert panel["targets"]
        assert {"$__rate_interval"} >= set(re.findall(r"\[([^\]]+)\]", target["expr"].replace("[0-9]", "")))

    @pytest.mark.parametrize(("panel", "target"), all_targets())
    def test_target_counter_agg_rule(self, panel: Board, target: Board) -> None:
        """A counter is only shown as a rate."""
        assert panel["targets"]
        counters = re.findall(r"(\w*\(?)\b\w+_total\{", target["expr"])
        assert {"rate("} >= set(counters)

    @pytest.mark.parametrize(("panel", "target"), all_targets())
    def test_target_promql_rule(self, panel: Board, target: Board) -> None:
        """Every expression is PromQL and asks for metrics and labels that exist."""
        known = check.known_series(build_groups())
        assert [] == check.problems_of(target["expr"], panel["title"], known)


class TestContent:
    def test_everything_that_exists_is_shown(self) -> None:
        """No problem in any dashboard or rule, no metric that no panel shows."""
        assert [] == check.check_all(BOARDS.values(), build_groups())

    @pytest.mark.parametrize("statistic", EXPORTED, ids=lambda statistic: statistic.name)
    def test_each_statistic_has_quantiles_bands_and_a_heatmap(self, statistic: Any) -> None:
        """Overview shows p50, p95 and p99 by phase, the median by band of layers, and the distribution over time."""
        metric = f"{statistic.metric}_bucket"
        shown = [panel for panel in check.panels(BOARDS["glassbox-overview"]) if panel.get("targets")]
        mine = {panel["title"]: panel for panel in shown if metric in panel["targets"][0]["expr"]}
        name = statistic.name.replace("_", " ").capitalize()
        quantiles = [target["expr"] for target in mine[f"{name}: quantiles"]["targets"]]
        assert ["0.5", "0.95", "0.99"] == [re.match(r"histogram_quantile\(([\d.]+)", e)[1] for e in quantiles]  # type: ignore[index]
        assert all("by (le, phase)" in expression for expression in quantiles)
        assert "by (le, layers)" in mine[f"{name}: median by layers"]["targets"][0]["expr"]
        heatmap = mine[f"{name}: distribution"]
        assert ("heatmap", "heatmap") == (heatmap["type"], heatmap["targets"][0]["format"])
        expected = f"sum by (le) (rate({metric}{{{promql.MATCHERS}}}[$__rate_interval]))"
        assert expected == heatmap["targets"][0]["expr"]

    @pytest.mark.parametrize("statistic", EXPORTED, ids=lambda statistic: statistic.name)
    def test_each_statistic_has_a_matrix_of_layers_by_heads(self, statistic: Any) -> None:
        """Heads has a table "Grouping to matrix" with coloured cells; without heads it says what to do."""
        found = [
            panel
            for panel in check.panels(BOARDS["glassbox-heads"])
            if any("groupingToMatrix" == step["id"] for step in panel.get("transformations", ()))
            and statistic.metric in panel["targets"][0]["expr"]
            and "offset" not in panel["targets"][0]["expr"]
            and "max_logit_window_max" not in panel["targets"][0]["expr"]
        ]
        (panel,) = found
        group = panel["transformations"][-1]
        assert ("layer", "head", "Value") == tuple(
            group["options"][key] for key in ("rowField", "columnField", "valueField")
        )
        assert "color-background" == panel["fieldConfig"]["defaults"]["custom"]["cellOptions"]["type"]
        assert panels.NO_HEADS == panel["fieldConfig"]["defaults"]["noValue"]
        assert 'head!=""' in panel["targets"][0]["expr"]
        assert (
            "by (layer, head)" in panel["targets"][0]["expr"] or "by (le, layer, head)" in panel["targets"][0]["expr"]
        )
        assert panel["targets"][0]["instant"]

    def test_heads_says_what_it_needs(self) -> None:
        """A text and a tile at the top name the setting that brings the label `head`."""
        tile, text = (panel for panel in BOARDS["glassbox-heads"]["panels"] if panel["gridPos"]["y"] == 1)
        assert "set detail: head" == tile["fieldConfig"]["defaults"]["noValue"]
        assert "export.prometheus.detail: head" in text["options"]["content"]

    def test_heads_shows_exactly_one_model(self) -> None:
        """Its cells would mix models else."""
        model = variable(BOARDS["glassbox-heads"], "model_name")
        assert (False, False) == (model["multi"], model["includeAll"])

    def test_signed_histograms_are_not_asked_for_a_sum(self) -> None:
        """max_logit has no `_sum`; asking for its mean is an error of the generator."""
        with pytest.raises(ValueError, match="max_logit has no mean"):
            promql.mean("max_logit")

    def test_a_share_is_cut_at_a_bucket(self) -> None:
        """A bound between two buckets is refused, because its share isn't known."""
        assert "0.99" == promql.bucket_name("top1_ratio", 0.99)
        assert "100.0" == promql.bucket_name("max_logit", 100.0)
        with pytest.raises(ValueError, match=r"0.95 is not a bucket bound of top1_ratio"):
            promql.bucket_name("top1_ratio", 0.95)

    @pytest.mark.parametrize(("panel", "target"), all_targets())
    def test_bucket_labels_exist(self, panel: Board, target: Board) -> None:
        """A value of `le` is one that the exporter writes."""
        written = {name for statistic in EXPORTED for name in bucket_names(statistic.buckets)}
        assert written >= set(re.findall(r'le="([^"]+)"', target["expr"])), panel["title"]

    def test_bands_hold_ten_layers_each(self) -> None:
        """Layer 7 is in 0-9, 10 in 10-19, 123 in 120-129, as Prometheus' label_replace does it."""
        match = re.search(r'"layers", "(.+?)", "layer", "(.+?)"', promql.banded("x"))
        assert match
        template = re.sub(r"\$\{(\d)\}", r"\\g<\1>", match[1])
        bands = {layer: re.fullmatch(match[2], layer).expand(template) for layer in ("7", "10", "123")}  # type: ignore[union-attr]
        assert {"7": "0-9", "10": "10-19", "123": "120-129"} == bands


class TestCheck:
    """What `--check` catches."""

    KNOWN = check.known_series(build_groups())

    @pytest.mark.parametrize(
        ("expression", "problem"),
        [
            ("rate(glassbox_step_total[5m])", "p: unknown metric glassbox_step_total"),
            ("glassbox_attention_max_logit_sum", "p: unknown metric glassbox_attention_max_logit_sum"),
            ("glassbox_attention_self_logprob_count", "p: unknown metric glassbox_attention_self_logprob_count"),
            ('glassbox_steps_total{layer="1"}', "p: glassbox_steps_total has no label layer"),
            ('glassbox_attention_rows_total{le="1.0"}', "p: glassbox_attention_rows_total has no label le"),
            ("sum by (reason) (glassbox_errors_total)", "p: groups by reason, which none of its metrics has"),
            (
                "engine_layer_phase:glassbox_attention_entropy_ratio:mean5m",
                "p: unknown metric engine_layer_phase:glassbox_attention_entropy_ratio:mean5m",
            ),
        ],
    )
    def test_names_what_does_not_exist(self, expression: str, problem: str) -> None:
        """One line with place and name."""
        assert [problem] == check.problems_of(expression, "p", self.KNOWN)

    def test_refuses_what_is_not_promql(self) -> None:
        """A syntax error is a problem, too."""
        (problem,) = check.problems_of("sum(rate(x[5m])", "p", self.KNOWN)
        assert problem.startswith("p: no PromQL: ")

    @pytest.mark.parametrize(
        "expression",
        [
            "sum by (layer, head) (rate(glassbox_attention_rows_total[$__rate_interval] offset $baseline))",
            f"sum by (layers) ({promql.banded('glassbox_attention_rows_total')})",
            "sum by (stage) (glassbox_errors_total)",
            'ALERTS{alertname="x", engine="0", phase="decode"}',
            "engine_layer_phase:glassbox_attention_entropy_ratio:mean10m",
        ],
    )
    def test_accepts_what_exists(self, expression: str) -> None:
        """Labels of the finest detail, own labels of label_replace, recorded series, ALERTS."""
        assert [] == check.problems_of(expression, "p", self.KNOWN)

    def test_a_metric_that_no_panel_shows_is_a_problem(self) -> None:
        """All metrics are missing from no dashboard; a listed one with a reason is not."""
        found = check.check_all([], build_groups())
        assert [
            f"no panel shows {family.name}; add one, or list it in NOT_SHOWN with a reason"
            for family in METRICS
            if family.name != "glassbox_start_seconds"
        ] == found


class TestReference:
    def test_names_every_metric_rule_and_alert(self) -> None:
        """docs/metrics.md has a row for each."""
        text = metrics_reference.render(build_groups())
        for family in METRICS:
            assert f"`{family.name}`" in text
        for group in build_groups():
            for rule in group.rules:
                assert rule.title in text
