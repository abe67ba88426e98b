"""glassbox's samples of an exposition, as a mapping that tests can compare."""

from collections.abc import Iterable
from typing import Final

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from glassbox.export.liveness import LIVENESS_METRICS

PREFIX: Final = "glassbox_"
# Name of the sample and its labels.
Key = tuple[str, frozenset[tuple[str, str]]]


# What the answering process tells of age and exporter: of the moment, so no two answers have the same.
OF_THE_MOMENT: Final = frozenset(family.name for family in LIVENESS_METRICS)


def glassbox_samples(exposition: str | Iterable[Metric]) -> dict[Key, float]:
    """Value of each of glassbox's samples in `/metrics` but for those of the moment, given as text or as families.

    Raises:
        ValueError: if a sample is there twice.
    """
    families = text_string_to_metric_families(exposition) if isinstance(exposition, str) else exposition
    found: dict[Key, float] = {}
    for family in families:
        if not family.name.startswith(PREFIX):
            continue
        for sample in family.samples:
            if sample.name in OF_THE_MOMENT:
                continue
            key = (sample.name, frozenset(sample.labels.items()))
            if key in found:
                raise ValueError(f"a sample must be there once, got {key} twice")
            found[key] = sample.value
    return found


def counts_against_rows(samples: dict[Key, float]) -> dict[Key, tuple[float, float]]:
    """Histogram counts that differ from the finite rows of the same labels: (count, rows); empty if all is well.

    Of the statistics: output checks have rows of their own.

    Raises:
        ValueError: if there is no histogram at all, which would prove nothing.
    """
    wrong, seen = {}, 0
    for (name, labels), count in samples.items():
        if not name.endswith("_count") or "output_error" in name:
            continue
        seen += 1
        rows = samples["glassbox_attention_rows_total", labels]
        rows -= samples["glassbox_attention_nonfinite_rows_total", labels]
        if count != rows:
            wrong[name, labels] = (count, rows)
    if not seen:
        raise ValueError("no histogram of glassbox is there")
    return wrong
