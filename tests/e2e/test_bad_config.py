"""A configuration that can't be used stops `vllm serve` at once, with one clear line.

How vLLM ends is the same for all that `register()` refuses, so a few stand for the others, each of which it refuses in
tests/unit/processes/test_plugin.py: text that is no YAML, a wrong value, bytes that are no text, and a file that may
not be read.
"""

import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.broken_configs import BROKEN, Broken
from tests.program import environment
from tests.serving import unprivileged

pytestmark = pytest.mark.e2e


STARTED = tuple(one for one in BROKEN if one.name in {"bad-yaml", "out-of-range", "junk", "no-permission"})


@dataclass(frozen=True)
class Ended:
    """A server that did not start."""

    path: Path
    status: int
    output: str
    seconds: float


def start(model: Path, folder: Path, broken: Broken) -> Ended:
    """Run `vllm serve` on a broken file until it ends."""
    folder.mkdir()
    path = folder / "glassbox.yaml"
    broken.apply(path)
    began = time.monotonic()
    finished = subprocess.run(
        [
            *(unprivileged() if broken.lacks_permission else ()),
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
            *("--host", "127.0.0.1", "--port", "0", "--enforce-eager"),
        ],
        env=environment(path, folder / "run"),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
        check=False,
    )
    output = finished.stdout.decode(errors="replace")
    return Ended(path, finished.returncode, output, time.monotonic() - began)


@pytest.fixture(scope="module")
def ended(demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Ended]:
    """Two at a time: nearly all of their time is vLLM's import, which needs one core."""
    folder = tmp_path_factory.mktemp("broken")
    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(lambda broken: start(demo_model_path, folder / broken.name, broken), STARTED)
        return {broken.name: run for broken, run in zip(STARTED, runs, strict=True)}


@pytest.mark.parametrize("broken", STARTED, ids=lambda broken: broken.name)
class TestBadFileAtStart:
    def test_server_stops_with_one_clear_line(self, ended: Mapping[str, Ended], broken: Broken) -> None:
        """The line names file, key, rule, value and remedy; no traceback; the exit status is 1."""
        run = ended[broken.name]
        ours = [line for line in run.output.splitlines() if "glassbox" in line]
        assert ours == [f"glassbox: {broken.message(run.path)}"]
        assert "Traceback" not in run.output
        assert run.status == 1

    def test_nothing_was_started(self, ended: Mapping[str, Ended], broken: Broken) -> None:
        """It ends before an engine or a model is loaded, and leaves no run directory."""
        run = ended[broken.name]
        assert "EngineCore" not in run.output
        assert "Starting to load model" not in run.output
        assert not (run.path.parent / "run").exists()
        # Ten seconds of import; the rest is for a machine that others use as well.
        assert run.seconds < 120
