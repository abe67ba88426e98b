"""A /metrics page as doctor needs it: glassbox's few numbers of a whole server, and whose page it is."""

import math
from collections.abc import Iterator, Mapping
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from glassbox.cli.doctor.reading import Answer

_OWN: Final = "glassbox_"
# By layer and head, and many: of these only rows and wrong outputs are looked at.
_ATTENTION: Final = "glassbox_attention_"
_OF_ATTENTION: Final = ("glassbox_attention_rows_total", "glassbox_attention_output_wrong")

Sample = tuple[Mapping[str, str], float]


class MetricsPage:
    """What a page says.

    Attributes:
        answer: that it came in.
        own: whether glassbox's metrics are on it.
        vllm, dynamo: whether those of vLLM, of NVIDIA's Dynamo are.
        unreadable: why glassbox's can't be read; empty if they can.
    """

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.unreadable = ""
        self._samples: dict[str, list[Sample]] = {}
        lines = answer.text.splitlines() if answer.status == 200 else []
        if not answer.whole and lines:
            lines.pop()  # cut off somewhere
        self.own = any(line.startswith(_OWN) for line in lines)
        self.vllm = any(line.startswith("vllm:") for line in lines)
        self.dynamo = any(line.startswith("dynamo_") for line in lines)
        try:
            for name, sample in _samples(lines):
                self._samples.setdefault(name, []).append(sample)
        except (ValueError, KeyError, IndexError) as error:
            self.unreadable = repr(error)

    def samples(self, name: str) -> list[Sample]:
        """Labels and value of each sample called `glassbox_<name>`."""
        return self._samples.get(_OWN + name, [])

    def total(self, name: str, **labels: str) -> float | None:
        """Sum of those with these labels; None if there is none. A NaN counts as none."""
        values = [value for has, value in self.samples(name) if labels.items() <= has.items()]
        known = [value for value in values if not math.isnan(value)]
        return sum(known) if known else None

    def by(self, name: str, label: str) -> dict[str, float]:
        """Sums above 0, by the value of a label."""
        sums: dict[str, float] = {}
        for has, value in self.samples(name):
            if value > 0:
                sums[has.get(label, "")] = sums.get(has.get(label, ""), 0.0) + value
        return sums


def _samples(lines: list[str]) -> Iterator[tuple[str, Sample]]:
    wanted = [line for line in lines if line.startswith(_OWN)]
    wanted = [line for line in wanted if not line.startswith(_ATTENTION) or line.startswith(_OF_ATTENTION)]
    for family in text_string_to_metric_families("\n".join([*wanted, ""])):
        for sample in family.samples:
            yield sample.name, (sample.labels, float(sample.value))
