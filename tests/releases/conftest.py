"""The releases that tests run, one smoke run of each in a session, and the record of what passed.

pytest tests/releases --record docs/data/releases.json
"""

import datetime
import platform
from collections import defaultdict
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from tests.program import environment, run_program
from tests.releases import smoke as smoke_program
from tools import releases_table
from tools.vllm_releases import Release, fetch, find, installed, reference

COMMAND = "make releases"
# Outcomes of this session: release, device, check.
_OUTCOMES: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)


def folder_of(release: Release) -> Path:
    """What is put in front of PYTHONPATH to run a release: its kept folder, or where it is installed."""
    if release == reference():
        here = installed()
        assert here is not None
        return here
    return fetch(release, whole=True)


def release_environment(release: Release, root: Path, **more: str) -> dict[str, str]:
    """Variables that make a release the vLLM of a process, with one thread, so that sums have one order."""
    return {
        "PYTHONPATH": f"{folder_of(release)}:{root}",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        **more,
    }


@pytest.fixture(scope="session")
def smoke(
    demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Callable[[Release], dict[str, Any]]:
    """Gives what tests/releases/smoke.py prints with a release; runs it once."""
    done: dict[str, dict[str, Any]] = {}

    def run(release: Release) -> dict[str, Any]:
        if release.name not in done:
            folder = tmp_path_factory.mktemp(f"release-{release.name}")
            (folder / "glassbox.yaml").write_text(smoke_program.CONFIG, encoding="utf-8")
            variables = environment(
                folder / "glassbox.yaml", folder / "run", **release_environment(release, pytestconfig.rootpath)
            )
            finished = run_program("releases/smoke.py", [str(demo_model_path)], variables, folder)
            done[release.name] = dict(finished.result)
        return done[release.name]

    return run


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
