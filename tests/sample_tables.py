"""Tables of features for tests: of made samples, in which is known what tells positives from negatives."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from glassbox.view.samples.feature_table import FeatureTable, SampleRow, TableOrigin, read_table, to_arrow

ORIGIN = TableOrigin("tiny/model", "0.1.0", "made.jsonl", "2026-11-30T19:00:00+00:00")
TELLING = "prompt_entropy_ratio_L1_H1"
LAYERS, HEADS = 3, 4


def make_rows(
    samples: int = 120,
    *,
    seed: int = 0,
    distance: float = 2.0,
    groups: int | None = None,
    also: Mapping[str, float] = {},
) -> list[SampleRow]:
    """Rows whose feature TELLING is normal with deviation 1, `distance` higher for positives; the others are noise.

    Args:
        groups: how many there are; samples take turns. Without there are none.
        also: features with a value that every sample has.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(samples):
        label = i % 2 == 1
        features = {
            f"{signal}_entropy_ratio_L{layer}_H{head}": float(rng.normal())
            for signal in ("answer", "prompt")
            for layer in range(LAYERS)
            for head in range(HEADS)
        }
        features[TELLING] += distance * label
        rows.append(
            SampleRow(
                sample=i,
                id=f"s{i}",
                label=label,
                group=None if groups is None else f"g{i // 2 % groups}",
                problem=None,
                truncated=False,
                prompt_tokens=int(rng.integers(10, 50)),
                answer_tokens=8,
                answer="text",
                features=features | also,
            )
        )
    return rows


def write_table(path: Path, rows: list[SampleRow], origin: TableOrigin = ORIGIN) -> Path:
    """The file that `glassbox extract` would have written."""
    pq.write_table(to_arrow(rows, origin), path)
    return path


def make_table(folder: Path, **changes: object) -> FeatureTable:
    """What is read of it."""
    return read_table(write_table(folder / "features.parquet", make_rows(**changes)))  # type: ignore[arg-type]
