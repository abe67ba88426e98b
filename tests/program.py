"""Runs one of the tests' own programs in a fresh Python, in an environment without this session's glassbox."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

RESULT: Final = "RESULT "
_ROOT: Final = Path(__file__).parents[1]


@dataclass(frozen=True)
class Finished:
    """A program that has ended: the JSON of its RESULT line, and all that it wrote."""

    result: Any
    log: str


def environment(config: Path | None = None, run_dir: Path | None = None, **more: str) -> dict[str, str]:
    """This process's environment for a program that loads vLLM on the CPU, offline.

    Args:
        config: GLASSBOX_CONFIG.
        run_dir: GLASSBOX_RUN_DIR.
        more: further variables.
    """
    dropped = ("GLASSBOX_", "OTEL_", "VLLM_PLUGINS", "PROMETHEUS_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    named = {"GLASSBOX_CONFIG": config, "GLASSBOX_RUN_DIR": run_dir}
    return {
        **clean,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # On a CPU vLLM 0.32 can't load what it has compiled ahead of time, and compiles for minutes at each start.
        "VLLM_USE_AOT_COMPILE": "0",
        "PYTHONPATH": os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        **{name: str(path) for name, path in named.items() if path is not None},
        **more,
    }


def write_plugin(folder: Path, group: str, target: str) -> None:
    """Make a plugin of vLLM that is found by whoever has the folder among its import paths.

    Args:
        folder: is made.
        group: of entry points.
        target: what is loaded, `module:name`.
    """
    name = f"glassbox_tests_{target.rpartition(':')[2]}"
    metadata = folder / f"{name}-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n", encoding="utf-8")


def run_program(
    program: str,
    args: Sequence[str],
    env: Mapping[str, str],
    cwd: Path,
    timeout_s: float = 600.0,
    prefix: Sequence[str] = (),
) -> Finished:
    """Run `tests/<program>` to its end; the test fails if the program does. What it writes lies in `cwd` meanwhile.

    Args:
        prefix: words before the command (`unshare`).
    """
    written = cwd / f"{Path(program).stem}.log"
    with written.open("w") as log:
        try:
            ended = subprocess.run(
                [*prefix, sys.executable, str(_ROOT / "tests" / program), *args],
                env=dict(env),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=timeout_s,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            ended = None
    text = written.read_text(errors="replace")
    results = [line for line in text.splitlines() if line.startswith(RESULT)]
    if ended != 0 or len(results) != 1:
        how = f"took more than {timeout_s:.0f} s" if ended is None else f"ended with {ended}"
        pytest.fail(f"{program} {how}:\n{text[-6000:]}")
    return Finished(json.loads(results[0].removeprefix(RESULT)), text)
