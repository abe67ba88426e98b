#!/usr/bin/env python3
"""What importing a module costs, for several checkouts in turns: how many modules, and how long.

Every run is a fresh interpreter that first imports what the process would have had anyway (`--after`), and then times
the module alone. Checkouts take turns, so that a machine that is busy for a while is busy for all of them. One run of
each comes first and is not counted: it writes the byte code.

    git worktree add --detach /tmp/before ec48807
    git worktree add --detach /tmp/after 90f5eb7
    tools/import_cost.py ec48807=/tmp/before:glassbox.step 90f5eb7=/tmp/after:glassbox.processes.worker.hook \\
        --after torch,vllm --after torch,vllm,vllm.v1.worker.cpu_worker --runs 11 -o docs/data/worker_import.csv
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# Rooms of today, and what they were called when all modules lay side by side.
_SHOWS: Final = ("glassbox.export", "glassbox.web", "glassbox.view", "glassbox.cli", "glassbox.commands")
_CHILD: Final = """
import json, sys, time
*before, module = sys.argv[1:]
for name in before:
    __import__(name)
known = set(sys.modules)
wall, cpu = time.perf_counter(), time.process_time()
__import__(module)
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
print(json.dumps([wall, cpu, sys.modules["glassbox"].__file__, sorted(set(sys.modules) - known)]))
"""


@dataclass(frozen=True)
class Case:
    """A module of a checkout, under a name of its own."""

    label: str
    checkout: Path
    module: str

    @classmethod
    def parse(cls, text: str) -> "Case":
        """From LABEL=CHECKOUT:MODULE."""
        label, _, rest = text.partition("=")
        checkout, _, module = rest.rpartition(":")
        if not (label and checkout and module):
            raise argparse.ArgumentTypeError(f"must be LABEL=CHECKOUT:MODULE, got {text}; e.g. now=.:glassbox.plugin")
        return cls(label, Path(checkout).resolve(), module)


def measure(case: Case, after: Sequence[str]) -> dict[str, float]:
    """One run; times in seconds, and how many modules it loaded: glassbox's, those of them that show, others'."""
    command = [sys.executable, "-c", _CHILD, *after, case.module]
    environment = {**os.environ, "PYTHONPATH": str(case.checkout)}
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=True)
    wall, cpu, file, loaded = json.loads(done.stdout.splitlines()[-1])
    if not Path(file).is_relative_to(case.checkout):
        raise SystemExit(f"{case.label}: {file} was imported, which is not of {case.checkout}")
    own = [name for name in loaded if name.partition(".")[0] == "glassbox"]
    return {
        "wall_ms": round(1000 * wall, 2),
        "cpu_ms": round(1000 * cpu, 2),
        "glassbox_modules": len(own),
        "showing_modules": sum(f"{name}.".startswith(tuple(f"{room}." for room in _SHOWS)) for name in own),
        "other_modules": len(loaded) - len(own),
    }


def main() -> None:
    """Measure, write each run as a line of CSV, and tell the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("cases", nargs="+", type=Case.parse, metavar="LABEL=CHECKOUT:MODULE")
    parser.add_argument(
        "--after", action="append", required=True, help="modules that are imported first; may be repeated"
    )
    parser.add_argument("--runs", type=int, default=15, help="of each")
    parser.add_argument("-o", "--output", type=Path, required=True)
    wanted = parser.parse_args()
    pairs = [(case, after) for after in wanted.after for case in wanted.cases]
    runs: list[dict[str, str | float]] = []
    for turn in range(wanted.runs + 1):
        for case, after in pairs if turn % 2 else reversed(pairs):
            found = measure(case, after.split(","))
            if turn:
                said = {"turn": turn, "checkout": case.label, "module": case.module, "after": after.replace(",", " ")}
                runs.append({**said, **found, "load": round(os.getloadavg()[0], 2)})
    with wanted.output.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(runs[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(runs)
    for case, after in pairs:
        own = [run for run in runs if (run["checkout"], run["after"]) == (case.label, after.replace(",", " "))]
        medians = {name: statistics.median(float(run[name]) for run in own) for name in found}
        print(f"{case.label} after {after}: {len(own)} runs, medians {medians}")


if __name__ == "__main__":
    main()
