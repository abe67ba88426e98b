"""What bench_tail makes of the parts that lie in its folder; the servers and their load are `make bench`'s matter."""

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path

from tests.bench.bench_load import Shape
from tests.bench.bench_tail import Plan, markdown, table, write_csv

PLAN = Plan(
    gpu=False, shape=Shape(16, 128, 32), part_s=20.0, eager=False, dtype="float32", settings=("default",)
)  # fmt: skip
ARMS = ("plain", "again", "default")


def part(folder: Path, arm: str, number: int, seconds: float, plan: Plan = PLAN, load: float = 0.5) -> None:
    """120 requests of 10 tokens, all alike."""
    about = {"plan": asdict(plan), "start": number, "round": 0, "load": load, "arm": arm, "rate": 2.0}
    found = {"ttfts": [2 * seconds] * 120, "itls": [[seconds] * 10] * 120, "output_throughput": 50.0}
    (folder / f"part-{plan.dtype}-{number}-{load}-{arm}.json").write_text(json.dumps(about | found))


class TestTable:
    def test_latencies_against_two_servers_without_the_plugin(self, tmp_path: Path) -> None:
        """In ms, of both metrics; p99.9 of 120 first tokens is left out."""
        for arm, seconds in zip(ARMS, (0.1, 0.3, 0.22), strict=True):
            part(tmp_path, arm, 0, seconds)
        lines = [line for line in table(tmp_path, PLAN) if line["arm"] == "default"]
        assert [
            ("itl", "p50", "220.00", "1.1000", ""),
            ("itl", "p99", "220.00", "1.1000", 1.01),
            ("itl", "p99.9", "220.00", "1.1000", 1.02),
            ("ttft", "p50", "440.00", "1.1000", ""),
            ("ttft", "p99", "440.00", "1.1000", 1.01),
        ] == [tuple(line[name] for name in ("metric", "quantile", "ms", "ratio", "target")) for line in lines]

    def test_whole_rounds_of_the_same_plan(self, tmp_path: Path) -> None:
        """What a deadline has cut off, and what was measured with other options, is not pooled."""
        for number in (0, 1):
            for arm in ARMS:
                part(tmp_path, arm, number, 0.1)
        part(tmp_path, "default", 2, 9.0)
        for arm in ARMS:
            part(tmp_path, arm, 3, 9.0, replace(PLAN, dtype="bfloat16"))
        lines = table(tmp_path, PLAN)
        assert {2} == {line["rounds"] for line in lines}
        assert {"1.0000"} == {line["ratio"] for line in lines}

    def test_nothing_measured_is_no_line(self, tmp_path: Path) -> None:
        """Not an error here."""
        assert [] == table(tmp_path, PLAN)

    def test_a_table_for_the_documentation(self, tmp_path: Path) -> None:
        """A column for each arm; where there are too few values, no line."""
        for arm, seconds in zip(ARMS, (0.1, 0.3, 0.22), strict=True):
            part(tmp_path, arm, 0, seconds)
        head, rule, first, *others = markdown(table(tmp_path, PLAN), ARMS)
        assert "| of saturation | | values | plain, ms | plain | again | default |" == head
        assert head.count("|") == rule.count("|")
        assert first == (
            "| 0.5 (2.00/s) | inter-token latency, p50 | 1,200 | 100.00 "
            "| 0.5000 [0.5000, 0.5000] | 1.5000 [1.5000, 1.5000] | 1.1000 [1.1000, 1.1000] |"
        )
        assert 4 == len(others)

    def test_a_file_tells_how_it_was_made(self, tmp_path: Path) -> None:
        """Above the table, as comments."""
        for arm in ARMS:
            part(tmp_path, arm, 0, 0.1)
        write_csv(tmp_path / "out" / "tail.csv", table(tmp_path, PLAN), {"command": "python -m a", "commit": "1"})
        lines = (tmp_path / "out" / "tail.csv").read_text().splitlines()
        assert ["# command: python -m a", "# commit: 1"] == lines[:2]
        assert 15 == len(list(csv.DictReader(lines[2:])))
