"""The picture of docs/performance.md: time of the statistics kernel over context length and over rows.

python tests/bench/plot_row_stats.py docs/data/row_stats_sweep.csv docs/images/row_stats.png

Reads what `bench_row_stats.py --suite sweep` wrote; needs no GPU.
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

# Bytes of one key in the sweep: 8 KV heads of 128 numbers in bfloat16.
KEY_BYTES = 8 * 128 * 2
# Contexts at which the sweep has many numbers of rows, and numbers of rows at which it has many contexts.
MIN_POINTS = 4


def read(path: Path) -> tuple[dict[tuple[int, int], float], float, str]:
    """(rows, keys) -> microseconds; copy bandwidth in GB/s; name of the GPU."""
    with path.open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["case"] == "sweep"]
    times = {(int(line["batch"]), int(line["context"])): float(line["time_us"]) for line in lines}
    return times, float(lines[0]["copy_gb_s"]), lines[0]["gpu"]


def curves(times: dict[tuple[int, int], float], of: int) -> dict[int, list[tuple[int, float]]]:
    """Points (other coordinate, time) by coordinate number `of` of the keys of `times`, ascending."""
    found: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for key, time in sorted(times.items()):
        found[key[of]].append((key[1 - of], time))
    return {fixed: points for fixed, points in sorted(found.items()) if len(points) >= MIN_POINTS}


def draw(axes: plt.Axes, points: dict[int, list[tuple[int, float]]], unit: str, copy_gb_s: float) -> None:
    """One line per entry, and dashed what copying the same keys at copy bandwidth would take."""
    for fixed, curve in points.items():
        x, y = zip(*curve, strict=True)
        (line,) = axes.plot(x, y, marker="o", markersize=3, label=f"{fixed:,} {unit}")
        ideal = [fixed * other * KEY_BYTES / copy_gb_s / 1000 for other in x]
        axes.plot(x, ideal, linestyle="--", linewidth=0.8, color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(bottom=5)
    axes.set_ylabel("time of one layer (us)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def main() -> None:
    """Usage: plot_row_stats.py CSV PNG."""
    source, target = map(Path, sys.argv[1:])
    times, copy_gb_s, gpu = read(source)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained", sharey=True)
    draw(left, curves(times, 0), "row(s)", copy_gb_s)
    left.set_xlabel("keys of each row")
    of_context = {keys: points for keys, points in curves(times, 1).items() if len(points) > MIN_POINTS}
    draw(right, of_context, "keys a row", copy_gb_s)
    right.set_xlabel("rows")
    right.set_ylabel("")
    figure.suptitle(
        f"All statistics of a layer, 32 query and 8 KV heads of 128, bfloat16, {gpu}\n"
        f"dashed: reading K at the copy bandwidth of the same run, {copy_gb_s:,.0f} GB/s",
        fontsize=9,
    )
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main()
