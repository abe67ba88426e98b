"""Panels in the look of these dashboards: tiles, time series, heatmaps, layer x head matrices, tables, texts.

Owns Grafana's options, so that the dashboards say only what is shown. Built from grafana-foundation-sdk's models.
Positions are not set here, see `layout.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from grafana_foundation_sdk.models import common, dashboard, heatmap, prometheus, stat, table, text, timeseries

DATASOURCE: Final = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")
# At detail head a series appears with a head's first measured row; below it never does.
NO_HEADS: Final = "No series per head: set export.prometheus.detail to head in glassbox.yaml"
GREEN, YELLOW, RED, BLUE, GREY = "green", "yellow", "red", "blue", "text"
_MATRIX_CORNER: Final = "layer\\head"  # what "Grouping to matrix" calls the column of the row names


@dataclass(frozen=True)
class Query:
    """A PromQL expression and the name of its series in the legend (`{{label}}` is replaced).

    Attributes:
        exemplar: also ask for the exemplars of its histogram; Grafana draws them as dots on time series.
    """

    expr: str
    legend: str = ""
    exemplar: bool = False


@dataclass(frozen=True)
class Levels:
    """Colours of a tile: `base` below the first bound, then each colour from its bound on."""

    base: str = GREEN
    steps: tuple[tuple[float, str], ...] = ()

    def config(self) -> dashboard.ThresholdsConfig:
        first = dashboard.Threshold(value=None, color=self.base)
        steps = [dashboard.Threshold(value=value, color=color) for value, color in self.steps]
        return dashboard.ThresholdsConfig(mode=dashboard.ThresholdsMode.ABSOLUTE, steps=[first, *steps])


def _targets(
    queries: Sequence[Query], fmt: prometheus.PromQueryFormat, instant: bool = False
) -> list[prometheus.Dataquery]:
    return [
        prometheus.Dataquery(
            expr=query.expr,
            legend_format=query.legend,
            ref_id=chr(ord("A") + number),
            format_val=fmt,
            instant=instant,
            range_val=not instant,
            exemplar=query.exemplar or None,
            editor_mode=prometheus.QueryEditorMode.CODE,
            datasource=DATASOURCE,
        )
        for number, query in enumerate(queries)
    ]


def _panel(
    kind: str,
    title: str,
    description: str,
    size: tuple[int, int],
    targets: Sequence[prometheus.Dataquery],
    options: object,
    field: dashboard.FieldConfig,
    overrides: Sequence[dashboard.DashboardFieldConfigSourceOverrides] = (),
    transformations: Sequence[dashboard.DataTransformerConfig] = (),
) -> dashboard.Panel:
    width, height = size
    return dashboard.Panel(
        type_val=kind,
        title=title,
        description=description,
        datasource=DATASOURCE,
        grid_pos=dashboard.GridPos(w=width, h=height),
        targets=list(targets) or None,
        options=options,
        transformations=list(transformations),
        field_config=dashboard.FieldConfigSource(defaults=field, overrides=list(overrides)),
    )


def _color(mode: dashboard.FieldColorModeId, fixed: str | None = None) -> dashboard.FieldColor:
    return dashboard.FieldColor(mode=mode, fixed_color=fixed)


def tile(
    title: str,
    description: str,
    query: Query,
    unit: str,
    *,
    levels: Levels | None = None,
    names: dict[str, tuple[str, str]] | None = None,
    reduce: str = "lastNotNull",
    no_value: str = "no rows",
    decimals: int | None = None,
    size: tuple[int, int] = (4, 4),
) -> dashboard.Panel:
    """One number with a colour.

    Args:
        levels: colours by value; None: plain.
        names: text and colour instead of a value, e.g. {"1": ("OK", "green")}.
        reduce: over the time range: lastNotNull, max, ...
        no_value: shown when there is no series.
    """
    mappings: list[dashboard.ValueMapping] = []
    if names:
        results = {
            value: dashboard.ValueMappingResult(text=shown, color=color, index=number)
            for number, (value, (shown, color)) in enumerate(names.items())
        }
        mappings.append(dashboard.ValueMap(options=results))
    # 0 / 0: nothing was measured in the interval.
    nan = dashboard.ValueMappingResult(text=no_value, color=GREY, index=len(names or {}))
    special = dashboard.DashboardSpecialValueMapOptions(match=dashboard.SpecialValueMatch.NULL_AND_NAN, result=nan)
    mappings.append(dashboard.SpecialValueMap(options=special))
    return _panel(
        "stat",
        title,
        description,
        size,
        _targets([query], prometheus.PromQueryFormat.TIME_SERIES),
        stat.Options(
            graph_mode=common.BigValueGraphMode.NONE if names else common.BigValueGraphMode.AREA,
            color_mode=common.BigValueColorMode.BACKGROUND if levels or names else common.BigValueColorMode.NONE,
            reduce_options=common.ReduceDataOptions(calcs=[reduce], fields="", values=False),
        ),
        dashboard.FieldConfig(
            unit=unit,
            decimals=decimals,
            mappings=mappings,
            no_value=no_value,
            thresholds=(levels or Levels(GREY)).config(),
            color=_color(dashboard.FieldColorModeId.THRESHOLDS),
        ),
    )


def lines(
    title: str,
    description: str,
    queries: Sequence[Query],
    unit: str,
    *,
    bounds: tuple[float | None, float | None] = (None, None),
    limit: float | None = None,
    stacked: bool = False,
    steps: bool = False,
    size: tuple[int, int] = (8, 8),
) -> dashboard.Panel:
    """Time series.

    Args:
        bounds: of the axis.
        limit: drawn as a dashed line, with the area above in red.
        steps: for values that change at once, such as settings.
    """
    low, high = bounds
    levels = Levels(GREEN, ((limit, RED),)) if limit is not None else Levels()
    style = common.GraphThresholdsStyleMode.DASHED if limit is not None else common.GraphThresholdsStyleMode.OFF
    return _panel(
        "timeseries",
        title,
        description,
        size,
        _targets(queries, prometheus.PromQueryFormat.TIME_SERIES),
        timeseries.Options(
            legend=common.VizLegendOptions(
                display_mode=common.LegendDisplayMode.LIST,
                placement=common.LegendPlacement.BOTTOM,
                show_legend=True,
                calcs=[],
            ),
            tooltip=common.VizTooltipOptions(mode=common.TooltipDisplayMode.MULTI, sort=common.SortOrder.DESCENDING),
        ),
        dashboard.FieldConfig(
            unit=unit,
            min_val=low,
            max_val=high,
            thresholds=levels.config(),
            color=_color(dashboard.FieldColorModeId.PALETTE_CLASSIC),
            custom=common.GraphFieldConfig(
                draw_style=common.GraphDrawStyle.LINE,
                line_width=1,
                fill_opacity=30 if stacked else 0,
                line_interpolation=common.LineInterpolation.STEP_AFTER if steps else common.LineInterpolation.LINEAR,
                show_points=common.VisibilityMode.NEVER,
                # No rows for some minutes is a gap to see, not to bridge; a missed scrape is not.
                span_nulls=60_000,
                stacking=common.StackingConfig(
                    mode=common.StackingMode.NORMAL if stacked else common.StackingMode.NONE, group="A"
                ),
                thresholds_style=common.GraphThresholdsStyleConfig(mode=style),
            ),
        ),
    )


def heat(title: str, description: str, query: Query, unit: str, *, size: tuple[int, int] = (8, 8)) -> dashboard.Panel:
    """A heatmap over time of a histogram's buckets; the query gives one series per `le`."""
    return _panel(
        "heatmap",
        title,
        description,
        size,
        _targets([query], prometheus.PromQueryFormat.HEATMAP),
        heatmap.Options(
            calculate=False,
            color=heatmap.HeatmapColorOptions(
                mode=heatmap.HeatmapColorMode.SCHEME,
                scheme="Viridis",
                fill="dark-orange",
                scale=heatmap.HeatmapColorScale.EXPONENTIAL,
                exponent=0.5,
                steps=64,
            ),
            filter_values=heatmap.FilterValueRange(le=1e-9),
            rows_frame=heatmap.RowsHeatmapOptions(layout=common.HeatmapCellLayout.AUTO),
            show_value=common.VisibilityMode.NEVER,
            cell_gap=1,
            cell_values=heatmap.CellValues(unit="cps"),
            y_axis=heatmap.YAxisConfig(unit=unit, axis_placement=common.AxisPlacement.LEFT, reverse=False),
            legend=heatmap.HeatmapLegend(show=True),
            tooltip=heatmap.HeatmapTooltip(mode=common.TooltipDisplayMode.SINGLE, y_histogram=True),
            exemplars=heatmap.ExemplarConfig(color="rgba(255,0,255,0.7)"),
        ),
        dashboard.FieldConfig(
            unit=unit,
            custom=heatmap.FieldConfig(
                scale_distribution=common.ScaleDistributionConfig(type_val=common.ScaleDistribution.LINEAR)
            ),
        ),
    )


def _to_number(*fields: str) -> dashboard.DataTransformerConfig:
    conversions = [{"targetField": field, "destinationType": "number"} for field in fields]
    return dashboard.DataTransformerConfig(
        id_val="convertFieldType", options={"conversions": conversions, "fields": {}}
    )


def _sort(field: str, descending: bool = False) -> dashboard.DataTransformerConfig:
    return dashboard.DataTransformerConfig(
        id_val="sortBy", options={"fields": {}, "sort": [{"field": field, "desc": descending}]}
    )


def _override(name: str, **properties: object) -> dashboard.DashboardFieldConfigSourceOverrides:
    return dashboard.DashboardFieldConfigSourceOverrides(
        matcher=dashboard.MatcherConfig(id_val="byName", options=name),
        properties=[dashboard.DynamicConfigValue(id_val=key, value=value) for key, value in properties.items()],
    )


def matrix(
    title: str,
    description: str,
    query: Query,
    unit: str,
    *,
    bounds: tuple[float | None, float | None] = (None, None),
    colors: dashboard.FieldColorModeId = dashboard.FieldColorModeId.CONTINUOUS_YL_BL,
    size: tuple[int, int] = (24, 16),
) -> dashboard.Panel:
    """A row per layer, a column per head, coloured by value; the query gives one value per `layer` and `head`."""
    low, high = bounds
    plain = {"cellOptions": common.TableAutoCellOptions().to_json(), "width": 80}
    group = {"rowField": "layer", "columnField": "head", "valueField": "Value", "emptyValue": "null"}
    return _panel(
        "table",
        title,
        description,
        size,
        _targets([query], prometheus.PromQueryFormat.TABLE, instant=True),
        table.Options(cell_height=common.TableCellHeight.SM, show_header=True),
        dashboard.FieldConfig(
            unit=unit,
            decimals=2,
            min_val=low,
            max_val=high,
            no_value=NO_HEADS,
            color=_color(colors),
            custom=common.TableFieldOptions(
                align=common.FieldTextAlignment.CENTER,
                min_width=50,
                cell_options=common.TableColoredBackgroundCellOptions(mode=common.TableCellBackgroundDisplayMode.BASIC),
            ),
        ),
        overrides=[
            _override(
                _MATRIX_CORNER, **{f"custom.{key}": value for key, value in plain.items()}, unit="none", decimals=0
            )
        ],
        # Labels are text and come in any order. Sorting is stable: by head first, so that it holds within a layer.
        transformations=[
            _to_number("layer", "head"),
            _sort("head"),
            _sort("layer"),
            dashboard.DataTransformerConfig(id_val="groupingToMatrix", options=group),
        ],
    )


def listing(
    title: str,
    description: str,
    query: Query,
    unit: str,
    columns: Sequence[str],
    *,
    sort: bool = True,
    value: str | None = "Value",
    no_value: str = "none",
    size: tuple[int, int] = (12, 8),
) -> dashboard.Panel:
    """A table of labels and a value, largest first.

    Args:
        columns: labels, in order; the others are left out.
        value: heading of the value; None: it is left out (an info metric).
    """
    hidden = {"Time": True} | ({"Value": True} if value is None else {})
    order = {name: number for number, name in enumerate([*columns, "Value"])}
    renamed = {"Value": value} if value not in {None, "Value"} else {}
    organize = {"excludeByName": hidden, "indexByName": order, "renameByName": renamed}
    return _panel(
        "table",
        title,
        description,
        size,
        _targets([query], prometheus.PromQueryFormat.TABLE, instant=True),
        table.Options(cell_height=common.TableCellHeight.SM, show_header=True),
        dashboard.FieldConfig(unit=unit, no_value=no_value, custom=common.TableFieldOptions()),
        transformations=[
            *([_sort("Value", descending=True)] if sort else []),
            dashboard.DataTransformerConfig(id_val="organize", options=organize),
        ],
    )


def note(title: str, description: str, content: str, *, size: tuple[int, int] = (24, 3)) -> dashboard.Panel:
    """A text in Markdown."""
    panel = _panel(
        "text",
        title,
        description,
        size,
        (),
        text.Options(mode=text.TextMode.MARKDOWN, content=content),
        dashboard.FieldConfig(),
    )
    panel.datasource = None
    return panel
