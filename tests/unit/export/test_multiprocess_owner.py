"""Files of the multiprocess directory have an owner, and go with it: real files, locks and processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from glassbox.config.load import load_config
from glassbox.export.families import build_families
from glassbox.export.multiprocess import MultiprocessWriter
from glassbox.plugin import register
from glassbox.processes.exporter import launch
from glassbox.store import multiprocess_files
from glassbox.store.merge import merge
from glassbox.store.snapshot import write_snapshot
from tests.export_samples import OWNER, make_snapshot, write_config

ROOT = Path(__file__).parents[3]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "multiproc"
    path.mkdir()
    return path


def shown(directory: Path) -> str:
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(directory))
    return generate_latest(registry).decode()


def killed_writer(directory: Path, owner: str) -> None:
    """Let a process write the families of a snapshot, and end without a chance to remove them."""
    program = (
        "import os, sys; from pathlib import Path; from tests.export_samples import make_snapshot; "
        "from glassbox.export.families import build_families; from glassbox.store.merge import merge; "
        "from glassbox.export.multiprocess import MultiprocessWriter; "
        "writer = MultiprocessWriter(Path(sys.argv[1]), sys.argv[2]); "
        "writer.write(build_families(merge([make_snapshot()]), 'model'), 1.0); "
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, str(directory), owner], check=False, cwd=ROOT)


def test_two_servers_share_a_directory(directory: Path) -> None:
    """Neither overwrites the other's; when one ends, the other's stay."""
    first, second = (MultiprocessWriter(directory, owner) for owner in (OWNER, "f" * 16))
    first.write(build_families(merge([make_snapshot(model_name="a", steps=1)]), "model"), 1.0)
    second.write(build_families(merge([make_snapshot(model_name="b", steps=2)]), "model"), 2.0)
    first.write(build_families(merge([make_snapshot(model_name="a", steps=3)]), "model"), 3.0)
    both = [f'glassbox_steps_total{{engine="0",model_name="{name}"}} {n}.0' for name, n in (("a", 3), ("b", 2))]
    assert all(line in shown(directory) for line in both)
    first.close()
    assert [line in shown(directory) for line in both] == [False, True]
    second.close()


def test_a_killed_servers_files_go_at_the_next_start(directory: Path) -> None:
    """Also those of a version whose files had no owner; a living one's, and vLLM's own, stay."""
    alive = MultiprocessWriter(directory, OWNER)
    alive.write(build_families(merge([make_snapshot(model_name="alive")]), "model"), 1.0)
    killed_writer(directory, "d" * 16)
    (directory / "counter_glassbox.db").write_bytes(b"old")
    (directory / "counter_123.db").write_bytes(b"vLLM's")
    assert len(list(directory.glob(f"*{'d' * 16}*"))) == 4
    multiprocess_files.purge_dead(directory)
    assert sorted(path.name for path in directory.glob("*.db")) == [
        "counter_123.db",
        *(f"{kind}_glassbox-{OWNER}.db" for kind in multiprocess_files.KINDS),
    ]
    assert not list(directory.glob(f"*{'d' * 16}*"))
    alive.close()


def test_what_can_not_be_told_stays(directory: Path) -> None:
    """A lock that can't be opened keeps no other one's files."""
    killed_writer(directory, "d" * 16)
    for owner in ("c" * 16, "e" * 16):
        (directory / multiprocess_files.file_name("counter", owner)).write_bytes(b"x")
        (directory / f".glassbox-{owner}.lock").symlink_to("nowhere")
    multiprocess_files.purge_dead(directory)
    assert sorted(path.name for path in directory.glob("*.db")) == [
        multiprocess_files.file_name("counter", owner) for owner in ("c" * 16, "e" * 16)
    ]


def test_also_where_glassbox_is_switched_off(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GLASSBOX_DISABLE=1 after a kill: what the dead server has measured is not shown."""
    killed_writer(directory, "d" * 16)
    assert "glassbox_steps_total" in shown(directory)
    monkeypatch.setenv("GLASSBOX_DISABLE", "1")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(directory))
    register()
    assert shown(directory) == ""


def test_a_link_is_not_written_through(directory: Path, tmp_path: Path) -> None:
    """Others may make files in such a directory."""
    target = tmp_path / "precious"
    target.write_text("mine")
    name = multiprocess_files.file_name("counter", OWNER)
    for link in (name, f".{name}.tmp"):
        (directory / link).symlink_to(target)
    writer = MultiprocessWriter(directory, OWNER)
    writer.write(build_families(merge([make_snapshot()]), "model"), 1.0)
    assert target.read_text() == "mine"
    assert not (directory / name).is_symlink()
    writer.close()


def test_a_new_exporter_takes_the_files_over(directory: Path) -> None:
    """Values of a dead exporter are replaced, not added."""
    killed_writer(directory, OWNER)
    writer = MultiprocessWriter(directory, OWNER)
    writer.write(build_families(merge([make_snapshot()]), "model"), 2.0)
    with pytest.raises(BlockingIOError, match="another exporter of this server"):
        MultiprocessWriter(directory, OWNER).write([], 3.0)
    assert 'glassbox_steps_total{engine="0",model_name="tiny/model"} 1000.0' in shown(directory)


def test_an_exporter_that_does_not_stop(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that ends kills it after a while, and removes what it can't remove any more."""
    monkeypatch.setattr(launch, "_STOP_TIMEOUT_S", 0.2)
    run_dir = tmp_path / "run"
    write_snapshot(run_dir, make_snapshot())
    config = load_config(write_config(tmp_path / "glassbox.yaml", interval_s=1))
    environ = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(directory)}
    exporter = launch.ExporterProcess(tmp_path / "glassbox.yaml", run_dir, environ)
    exporter.ensure(config)
    deadline = time.monotonic() + 60.0
    while len(list(directory.glob("*.db"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert exporter.pid is not None
    os.kill(exporter.pid, signal.SIGSTOP)
    exporter.stop()
    assert list(directory.iterdir()) == []
