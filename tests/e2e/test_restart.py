"""A killed server leaves nothing to its successor, and a stopped one leaves nothing at all."""

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.e2e.samples import Key, glassbox_samples
from tests.serving import BASE_CONFIG, GlassboxServer, own_cache

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

STOPPED_S = 30.0


@dataclass(frozen=True)
class Lives:
    """What two servers with the same settings and caches did, the first killed, the second stopped.

    Attributes:
        dead_samples: of the first, before it was killed; and its run directory.
        survivors: its processes that lived on for more than some seconds.
        dead_dir_after_kill: was the run directory still there then (nobody was left to remove it)?
        new_samples: of the second at its start, and its run directories (all that there are).
        served_rows: rows of the second after it has served one request.
        left_processes, left_dirs: of the second after SIGTERM.
        compiled: how often the kernel was by the end of the first, and of the second.
        started: what the second told of its start: seconds, and lines of its log.
    """

    dead_samples: dict[Key, float]
    dead_dir: str
    survivors: list[str]
    dead_dir_after_kill: bool
    new_samples: dict[Key, float]
    new_dirs: list[str]
    served_rows: float | None
    left_processes: list[str]
    left_dirs: list[str]
    exporters: list[str]
    compiled: tuple[int, int]
    started: tuple[float | None, list[str]]


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []


def living(processes: list[psutil.Process]) -> list[str]:
    """Command lines of those that still run."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()) or process.name())
    return found


def remaining(processes: list[psutil.Process], timeout_s: float) -> list[str]:
    """Those of the processes that haven't ended after `timeout_s`; the test judges them."""
    psutil.wait_procs(processes, timeout=timeout_s)
    return living(processes)


@pytest.fixture(scope="module")
def lives(demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lives]:
    """Start, serve, SIGKILL; start again with the same settings, serve, SIGTERM."""
    folder = tmp_path_factory.mktemp("lives")
    runtime = folder / "runtime"
    runtime.mkdir(mode=0o700)
    # No run directory is named: glassbox's own, which it must clean up itself. JSONL needs the exporter process.
    config = {**BASE_CONFIG, "export": {"interval_s": 1, "jsonl": {"path": str(folder / "windows.jsonl")}}}
    runs = folder / "runs"
    cache = own_cache(folder, f'echo "$*" >> "{runs}"; exec g++ "$@"')
    env = {"GLASSBOX_RUN_DIR": None, "XDG_RUNTIME_DIR": str(runtime), **cache}

    def compiled() -> int:
        return runs.read_text().count("row_stats.cpp")

    with contextlib.ExitStack() as stack:

        def start(name: str) -> GlassboxServer:
            (folder / name).mkdir()
            server = GlassboxServer(demo_model_path, folder / name, config=config, env=env)
            return stack.enter_context(server)

        first = start("first")
        first.complete("The sea is", max_tokens=8)
        first.settled_rows()
        dead_samples = glassbox_samples(first.metrics())
        (dead_dir,) = names(runtime)
        first_compiled = compiled()
        processes = first.processes()
        exporters = [line for line in living(processes) if "glassbox.processes.exporter" in line]
        # The exporter has a session of its own, so this does not hit it: it must see for itself that all is over.
        os.killpg(first.pid, signal.SIGKILL)
        survivors = remaining(processes, STOPPED_S)
        dead_dir_after_kill = (runtime / dead_dir).is_dir()

        second = start("second")
        new_samples, new_dirs = glassbox_samples(second.metrics()), names(runtime)
        second.complete("The sea is", max_tokens=8)
        second.settled_rows()
        served_rows = second.metric("glassbox_attention_rows_total", phase="decode")
        seconds, log = second.metric("glassbox_start_seconds"), second.log_path.read_text(errors="replace")
        processes = second.processes()
        os.kill(second.pid, signal.SIGTERM)
        left = remaining(processes, STOPPED_S)
        yield Lives(
            dead_samples=dead_samples,
            dead_dir=dead_dir,
            survivors=survivors,
            dead_dir_after_kill=dead_dir_after_kill,
            new_samples=new_samples,
            new_dirs=new_dirs,
            served_rows=served_rows,
            left_processes=left,
            left_dirs=names(runtime),
            exporters=exporters,
            compiled=(first_compiled, compiled()),
            started=(seconds, [line for line in log.splitlines() if "glassbox took" in line]),
        )


class TestKilled:
    def test_every_process_of_a_killed_server_ends(self, lives: Lives) -> None:
        """The exporter, in a session of its own, notices that its parent is gone; there was one."""
        assert len(lives.exporters) == 1
        assert lives.survivors == []

    def test_the_next_start_removes_the_dead_run_directory(self, lives: Lives) -> None:
        """A killed server can't clean up; the next one does, and has a directory of its own."""
        assert lives.dead_dir_after_kill
        assert lives.dead_dir not in lives.new_dirs
        assert len(lives.new_dirs) == 1

    def test_counters_start_clean(self, lives: Lives) -> None:
        """Every counter of the new server is 0 until it serves, though the dead one had counted."""

        def counted(samples: dict[Key, float]) -> dict[str, float]:
            return {
                name: value
                for (name, _), value in samples.items()
                if name.endswith(("_total", "_bucket", "_count", "_sum")) and value != 0
            }

        assert counted(lives.dead_samples)
        assert counted(lives.new_samples) == {}

    def test_the_new_server_counts_only_its_own(self, lives: Lives) -> None:
        """One request with 8 tokens: 7 decode rows in each of 30 x 9 heads."""
        assert lives.served_rows == 7 * 30 * 9

    def test_a_start_with_a_warm_cache_compiles_nothing(self, lives: Lives) -> None:
        """The first one compiled the kernel, once."""
        assert (1, 1) == lives.compiled

    def test_the_start_is_told(self, lives: Lives) -> None:
        """What glassbox took of it, as a metric and in one line of the log, which agree."""
        seconds, (line,) = lives.started
        assert seconds is not None
        assert seconds > 0
        assert f"glassbox took {seconds:.2f} s of this worker's start (register " in line


class TestStopped:
    def test_a_stopped_server_leaves_no_process(self, lives: Lives) -> None:
        """After SIGTERM all of them end by themselves, the exporter included."""
        assert lives.left_processes == []

    def test_a_stopped_server_leaves_no_run_directory(self, lives: Lives) -> None:
        """The owner removes it at its exit."""
        assert lives.left_dirs == []
