"""An analysis as one HTML page that needs nothing else: tables, and pictures inside of it.

Owns what the page says; how it looks is `view/analysis.html.j2`, the pictures are `pictures`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import jinja2
from matplotlib.figure import Figure

from glassbox import __version__
from glassbox.view.charts import inline_svg
from glassbox.view.samples import pictures
from glassbox.view.samples.analysis import Analysis

_TELLING_SHOWN: Final = 30
_MAPS_SHOWN: Final = 12
_DISTRIBUTIONS_SHOWN: Final = 6
# From where on a length tells enough to be the reason for what a head tells.
_LENGTH_TELLS: Final = 0.1


@dataclass(frozen=True)
class _Picture:
    label: str
    svg: str

    @classmethod
    def of(cls, label: str, figure: Figure) -> "_Picture":
        return cls(label, inline_svg(figure, label))


def render(analysis: Analysis) -> str:
    """The page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("glassbox.view", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    best = analysis.best_of_groups()
    tables = [
        ("Most telling heads", "heads-table", [one.cells() for one in analysis.features[:_TELLING_SHOWN]]),
        ("Best head of each signal", "signals", [one.cells() for one in best]),
        ("The lengths alone", "lengths", [one.cells() for one in analysis.lengths]),
    ]
    placed = [one for one in best if one.feature is not None and one.feature.layer is not None]
    maps = [one.feature.group for one in placed[:_MAPS_SHOWN] if one.feature is not None]
    by_layer = [_Picture.of("by layer", pictures.by_layer(analysis))] if placed else []
    by_head = [_Picture.of(group, pictures.area_map(analysis, group)) for group in maps]
    sections = [
        ("By layer and head", "heads", by_layer + by_head),
        (
            "Distributions",
            "distributions",
            [
                _Picture.of(f"distribution of {one.name}", pictures.distribution(analysis, one))
                for one in best[:_DISTRIBUTIONS_SHOWN]
            ],
        ),
    ]
    return environment.get_template("analysis.html.j2").render(
        table=analysis.table.path.name,
        model=analysis.table.model_name,
        version=__version__,
        facts=_facts(analysis),
        warnings=_warnings(analysis),
        interval=f"bootstrap, {analysis.bootstrap:,} resamplings",
        correction=analysis.correction,
        tables=tables,
        sections=sections,
    )


def _facts(analysis: Analysis) -> Sequence[tuple[str, str]]:
    total = len(analysis.table.labels)
    groups = [] if analysis.num_groups is None else [("groups", f"{analysis.num_groups:,}")]
    return [
        ("model", analysis.table.model_name),
        ("samples", f"{total:,}"),
        ("with label true", f"{analysis.positives:,}"),
        *groups,
        ("features", f"{len(analysis.features):,}"),
    ]


def _warnings(analysis: Analysis) -> list[str]:
    found = []
    if analysis.unlabelled:
        found.append(f"{analysis.unlabelled:,} samples without a label are left out.")
    if analysis.table.problems:
        found.append(f"{analysis.table.problems:,} samples without features are left out; the table says why.")
    if analysis.left_out:
        found.append(f"{analysis.left_out}.")
    for one in analysis.lengths:
        if one.distance > _LENGTH_TELLS:
            words = one.name.replace("_", " ")
            found.append(f"The {words} alone tell with an AUROC of {one.auroc:.3f}: look at the areas at equal length.")
    return found
