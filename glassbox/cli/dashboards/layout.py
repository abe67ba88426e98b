"""The frame of a dashboard: variables, links, rows, and where each panel stands on the grid of 24 columns."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from grafana_foundation_sdk.models import dashboard

from glassbox.cli.dashboards import promql
from glassbox.cli.dashboards.panels import DATASOURCE

GRID_COLUMNS: Final = 24
SCHEMA_VERSION: Final = 39  # read by Grafana 10.4 and later
TAGS: Final = ("vllm", "glassbox")
# Exists from the first snapshot on, for every server, model and engine.
_PRESENCE: Final = "glassbox_steps_total"
# Variable, and those on which its values depend.
_QUERY_VARIABLES: Final[dict[str, tuple[str, ...]]] = {
    "job": (),
    "instance": ("job",),
    "model_name": ("job", "instance"),
    "engine": ("job", "instance", "model_name"),
}
_LABELS: Final = {"job": "Job", "instance": "Instance", "model_name": "Model", "engine": "Engine"}


@dataclass(frozen=True)
class Section:
    """A row with a heading and its panels; a folded one asks nothing until it is opened."""

    title: str
    panels: Sequence[dashboard.Panel]
    folded: bool = False


@dataclass(frozen=True)
class Page:
    """What makes one dashboard.

    Attributes:
        one_model: exactly one model is chosen, because its panels would mix models.
        extra_variables: besides the common ones.
    """

    uid: str
    title: str
    description: str
    sections: Sequence[Section]
    one_model: bool = False
    extra_variables: Sequence[dashboard.VariableModel] = field(default=())


def choice(name: str, label: str, description: str, values: Sequence[str]) -> dashboard.VariableModel:
    """A variable with fixed values; the first one is preset."""
    options = [dashboard.VariableOption(text=value, value=value, selected=value == values[0]) for value in values]
    return dashboard.VariableModel(
        type_val=dashboard.VariableType.CUSTOM,
        name=name,
        label=label,
        description=description,
        query=",".join(values),
        current=options[0],
        options=options,
    )


def _query_variable(name: str, *, one: bool) -> dashboard.VariableModel:
    matchers = ", ".join(f'{label}=~"${label}"' for label in _QUERY_VARIABLES[name])
    query = f"label_values({_PRESENCE}{{{matchers}}}, {name})" if matchers else f"label_values({_PRESENCE}, {name})"
    everything = dashboard.VariableOption(text="All", value="$__all", selected=True)
    return dashboard.VariableModel(
        type_val=dashboard.VariableType.QUERY,
        name=name,
        label=_LABELS[name],
        description=f"{_LABELS[name]} whose series are shown.",
        query={"query": query, "refId": "variable"},
        datasource=DATASOURCE,
        refresh=dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED,
        sort=dashboard.VariableSort.NATURAL_ASC,
        multi=not one,
        include_all=not one,
        all_value=None if one else ".+",
        current=None if one else everything,
    )


def _variables(page: Page) -> list[dashboard.VariableModel]:
    source = dashboard.VariableModel(
        type_val=dashboard.VariableType.DATASOURCE,
        name="datasource",
        label="Data source",
        description="The Prometheus that scrapes the servers.",
        query="prometheus",
        # Grafana takes its default Prometheus; none is named here, so the file can be imported anywhere.
        refresh=dashboard.VariableRefresh.ON_DASHBOARD_LOAD,
    )
    queries = [_query_variable(name, one=name == "model_name" and page.one_model) for name in _QUERY_VARIABLES]
    return [source, *queries, *page.extra_variables]


def _annotations() -> dashboard.AnnotationContainer:
    changed = f"changes({promql.select('glassbox_config_last_reload_timestamp_seconds')}[$__rate_interval]) > 0"
    reload = dashboard.AnnotationQuery(
        name="Configuration reloads", datasource=DATASOURCE, enable=True, icon_color="blue", expr=changed
    )
    return dashboard.AnnotationContainer(list_val=[reload])


def _place(sections: Sequence[Section]) -> list[dashboard.Panel | dashboard.RowPanel]:
    """Give ids and positions: left to right, a new line where one is full."""
    placed: list[dashboard.Panel | dashboard.RowPanel] = []
    number, top = 0, 0
    for section in sections:
        number += 1
        row = dashboard.RowPanel(
            title=section.title,
            collapsed=section.folded,
            id_val=number,
            grid_pos=dashboard.GridPos(x=0, y=top, w=GRID_COLUMNS, h=1),
        )
        placed.append(row)
        left, line, top = 0, 0, top + 1
        for panel in section.panels:
            number += 1
            assert panel.grid_pos is not None
            if left + panel.grid_pos.w > GRID_COLUMNS:
                left, line, top = 0, 0, top + line
            panel.id_val, panel.grid_pos.x, panel.grid_pos.y = number, left, top
            left, line = left + panel.grid_pos.w, max(line, panel.grid_pos.h)
        top += line
        if section.folded:
            row.panels = list(section.panels)  # Grafana keeps the panels of a folded row inside it
            top = row.grid_pos.y + 1 if row.grid_pos else top
        else:
            placed += section.panels
    return placed


def build(page: Page) -> dashboard.Dashboard:
    """The dashboard of a page."""
    link = dashboard.DashboardLink(
        title="glassbox",
        type_val=dashboard.DashboardLinkType.DASHBOARDS,
        icon="external link",
        tooltip="The other dashboards of glassbox, with the same servers and time range",
        tags=["glassbox"],
        include_vars=True,
        keep_time=True,
    )
    return dashboard.Dashboard(
        uid=page.uid,
        title=page.title,
        description=page.description,
        tags=list(TAGS),
        timezone="browser",
        editable=True,
        graph_tooltip=dashboard.DashboardCursorSync.CROSSHAIR,
        time=dashboard.DashboardDashboardTime(from_val="now-1h", to="now"),
        refresh="30s",
        schema_version=SCHEMA_VERSION,
        version=1,
        panels=_place(page.sections),
        templating=dashboard.DashboardDashboardTemplating(list_val=_variables(page)),
        annotations=_annotations(),
        links=[link],
    )
