"""The releases that tests run, one smoke run of each in a session, and the record of what passed.

pytest tests/releases --record docs/data/releases.json
"""

import datetime
import os
import platform
from collections import defaultdict
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from tests.program import environment, run_program
from tests.releases import smoke as smoke_program
from tools import releases_table
from tools.vllm_releases import Release, find, folder_of

COMMAND = "make releases"
# Outcomes of this session: release, device, check.
_OUTCOMES: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)


def vllm_environment(folder: Path, root: Path, **more: str) -> dict[str, str]:
    """Variables that make the vLLM in a folder that of a process, with one thread, so that sums have one order.

    What else this process finds by PYTHONPATH remains: it may hold another torch.
    """
    return {
        "PYTHONPATH": os.pathsep.join([str(folder), str(root), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        **more,
    }


@pytest.fixture(scope="session")
def smoke_of(
    demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Callable[[Path], dict[str, Any]]:
    """Gives what tests/releases/smoke.py prints with the vLLM in a folder, and its `log`; runs it once."""
    done: dict[Path, dict[str, Any]] = {}

    def run(vllm: Path) -> dict[str, Any]:
        if vllm not in done:
            folder = tmp_path_factory.mktemp("smoke")
            (folder / "glassbox.yaml").write_text(smoke_program.CONFIG, encoding="utf-8")
            variables = environment(
                folder / "glassbox.yaml", folder / "run", **vllm_environment(vllm, pytestconfig.rootpath)
            )
            finished = run_program("releases/smoke.py", [str(demo_model_path)], variables, folder)
            done[vllm] = {**finished.result, "log": finished.log}
        return done[vllm]

    return run


@pytest.fixture(scope="session")
def smoke(smoke_of: Callable[[Path], dict[str, Any]]) -> Callable[[Release], dict[str, Any]]:
    """Likewise of a release."""
    return lambda release: smoke_of(folder_of(release, whole=True))


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--record FILE`."""
    parser.addoption("--record", type=Path, help="write what passed for each vLLM release into this file")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note how the checks of releases went."""
    report = yield
    marker = item.get_closest_marker("check")
    callspec = getattr(item, "callspec", None)
    if marker is not None and callspec is not None and (report.when == "call" or not report.passed):
        name, device = marker.args
        checks = _OUTCOMES[callspec.params["release"].name, device]
        # A check may be several tests: it passes if all of them do.
        checks[name] = report.outcome if checks.get(name, "passed") == "passed" else checks[name]
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the record."""
    path: Path | None = session.config.getoption("--record", default=None)
    if path is None:
        return
    import torch

    rows = [
        {
            "release": name,
            "version": find(name).version,
            "device": device,
            "torch": find(name).torch if device == releases_table.SOURCE else torch.__version__,
            "python": platform.python_version(),
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            "command": COMMAND,
            "checks": checks,
        }
        for (name, device), checks in _OUTCOMES.items()
    ]
    releases_table.record(path, rows)
