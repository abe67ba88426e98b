"""A run directory that an operator names is one server's at a time: real processes, locks and files."""

import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from glassbox.store import ownership, rundir
from glassbox.store.exporter_status import ExporterStatus, read_status, write_status
from glassbox.store.score_totals import ScoreTotals, read_totals, write_totals
from glassbox.store.snapshot import read_snapshots, write_snapshot
from glassbox.store.trace_directory import TraceDirectory, traces_path
from glassbox.store.trace_record import write_trace
from glassbox.store.trace_refusals import Refusal, RefusalReader, write_refusals
from tests.export_samples import logged, make_snapshot
from tests.other_process import OtherProcess
from tests.trace_samples import make_trace


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """Of an operator who has named a directory."""
    (tmp_path / "runtime").mkdir()
    return {"XDG_RUNTIME_DIR": str(tmp_path / "runtime"), "GLASSBOX_RUN_DIR": str(tmp_path / "named")}


@pytest.fixture
def named(tmp_path: Path) -> Path:
    return tmp_path / "named"


@pytest.fixture
def start(environ: dict[str, str]) -> Iterator[Callable[..., OtherProcess]]:
    with ExitStack() as stack:

        def start(*args: str, **more: str) -> OtherProcess:
            other = OtherProcess({**environ, **more}, *args)
            stack.callback(other.kill)
            return other

        yield start


class TestOneServer:
    def test_the_first_takes_it(self, environ: dict[str, str], named: Path) -> None:
        """Made for this user only, and left as it was named."""
        undo = ownership.settle(environ)
        assert rundir.run_dir(environ) == named
        assert stat.S_IMODE(named.stat().st_mode) == 0o700
        assert environ["GLASSBOX_RUN_OWNER"].startswith(f"{os.getpid()}-")
        undo()
        assert "GLASSBOX_RUN_OWNER" not in environ
        assert environ["GLASSBOX_RUN_DIR"] == str(named)

    def test_its_children_share_it(
        self, environ: dict[str, str], named: Path, start: Callable[..., OtherProcess]
    ) -> None:
        """Those of one server, however many, and also one that is started while others are."""
        undo = ownership.settle(environ)
        write_snapshot(named, make_snapshot())
        children = [start(**environ) for _ in range(2)]
        assert [child.run_dir for child in children] == [named, named]
        assert len(read_snapshots(named)) == 1, "what they have measured stays"
        assert "".join(child.kill() for child in children) == ""
        undo()

    def test_a_relative_path(self, environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Children may have another working directory."""
        monkeypatch.chdir(tmp_path)
        undo = ownership.settle(environ := {**environ, "GLASSBOX_RUN_DIR": "named"})
        assert environ["GLASSBOX_RUN_DIR"] == str(tmp_path / "named")
        undo()
        assert environ["GLASSBOX_RUN_DIR"] == "named"

    def test_nothing_is_written_where_glassbox_names_it(self, tmp_path: Path) -> None:
        """Its name has the owner already."""
        environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
        ownership.settle(environ)
        assert list(tmp_path.iterdir()) == []
        assert "GLASSBOX_RUN_OWNER" not in environ


class TestTwoServers:
    def test_the_second_has_one_of_its_own_and_says_so(
        self, environ: dict[str, str], named: Path, start: Callable[..., OtherProcess], caplog: pytest.LogCaptureFixture
    ) -> None:
        """One error with the reason, both directories and what to do; children follow it without another word."""
        first = start()
        assert first.run_dir == named
        with caplog.at_level(logging.ERROR, "glassbox"):
            undo = ownership.settle(environ)
        own = rundir.run_dir(environ)
        assert own.parent == Path(environ["XDG_RUNTIME_DIR"])
        assert logged(caplog.records) == [
            f"GLASSBOX_RUN_DIR {named} can't be this server's: another server uses it (process {first.process.pid}). "
            f"Its files are in {own} instead, and nothing is mixed. Give each server a directory of its own, or leave "
            "GLASSBOX_RUN_DIR unset"
        ]
        child = start(**environ)
        assert (child.run_dir, child.kill()) == (own, "")
        rundir.create(environ)
        assert rundir.remove(environ), "it is this server's to remove"
        undo()
        assert environ["GLASSBOX_RUN_DIR"] == str(named)

    def test_variables_of_another_directory_are_no_claim(
        self, environ: dict[str, str], tmp_path: Path, start: Callable[..., OtherProcess]
    ) -> None:
        """A server that was started by a process of another one: it is no child of that for its own directory."""
        undo = ownership.settle(environ)
        other = start(GLASSBOX_RUN_DIR=str(tmp_path / "other"), GLASSBOX_RUN_OWNER=environ["GLASSBOX_RUN_OWNER"])
        assert other.run_dir == tmp_path / "other"
        (owner,) = ((tmp_path / "other" / "owner").read_text(),)
        assert owner.startswith(f"{other.process.pid}-")
        undo()

    def test_a_stray_child_of_a_dead_server_stays_out(
        self, environ: dict[str, str], named: Path, start: Callable[..., OtherProcess]
    ) -> None:
        """It comes when the directory is another one's already."""
        undo = ownership.settle(environ)
        stray = dict(environ)
        undo()
        second = start()
        assert second.run_dir == named
        undo = ownership.settle(stray)
        assert rundir.run_dir(stray) != named
        undo()

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a directory of another user")
    def test_another_users_directory(self, environ: dict[str, str], named: Path) -> None:
        """Made first by somebody who wants to be trusted: another one is chosen, and serving goes on."""
        named.mkdir()
        os.chown(named, 65534, -1)
        undo = ownership.settle(environ)
        assert rundir.run_dir(environ).parent == Path(environ["XDG_RUNTIME_DIR"])
        assert list(named.iterdir()) == []
        undo()

    def test_a_link_in_its_place(self, environ: dict[str, str], named: Path, tmp_path: Path) -> None:
        """Nor is it followed; the same for a file, and for a pipe in the place of the owner's file."""
        (tmp_path / "elsewhere").mkdir()
        named.symlink_to(tmp_path / "elsewhere")
        undo = ownership.settle(environ)
        assert rundir.run_dir(environ) != named
        assert list((tmp_path / "elsewhere").iterdir()) == []
        undo()
        named.unlink()
        named.mkdir(mode=0o700)
        os.mkfifo(named / "owner")
        undo = ownership.settle(environ)
        assert rundir.run_dir(environ) != named
        undo()


class TestRestart:
    @pytest.fixture
    def dead(self, named: Path, start: Callable[..., OtherProcess]) -> None:
        """A server that was killed, and what it has left."""
        server = start()
        write_snapshot(named, make_snapshot(steps=77))
        write_status(named, ExporterStatus(1, 1.0, {"otel": 5}))
        write_totals(named, ScoreTotals(1.0, ("drift",)))
        write_refusals(named, "0", 0, "i0", [Refusal("a", "why", 1.0)])
        write_trace(traces_path(named), make_trace(request_id="ended"))
        write_trace(traces_path(named), make_trace(seed=1, request_id="ran", status="active", end_time_s=None))
        (named / ".worker-0-0-x.npz.tmp").write_bytes(b"half")
        (named / "notes.txt").write_text("the operator's")
        server.kill()

    def test_dead_engines_disappear(self, dead: None, environ: dict[str, str], named: Path) -> None:
        """Snapshots, error counts and requests that ran; ended requests stay, and so does what isn't glassbox's."""
        undo = ownership.settle(environ)
        assert rundir.run_dir(environ) == named
        assert read_snapshots(named) == []
        assert read_status(named) is None
        assert read_totals(named) is None
        assert RefusalReader(named).read() == []
        assert [trace.request_id for trace in TraceDirectory(named).summaries()] == ["ended"]
        assert (named / "notes.txt").read_text() == "the operator's"
        assert list(named.glob(".*")) == []
        undo()

    def test_it_waits_for_dying_processes(self, environ: dict[str, str], named: Path) -> None:
        """The first process was killed, a child of it still writes for a moment: not mixed, and no other directory."""
        forking = (
            "import os, time; from glassbox.store import ownership, rundir; ownership.settle(); child = os.fork();"
            "(print(rundir.run_dir(), flush=True), time.sleep(600)) if child else (input(), os._exit(0))"
        )
        dying = OtherProcess(environ, forking).process
        dying.kill()
        dying.wait()
        assert dying.stdin is not None
        end = threading.Timer(1.0, lambda: print(file=dying.stdin, flush=True))
        began = time.monotonic()
        end.start()
        undo = ownership.settle(environ)
        assert rundir.run_dir(environ) == named
        assert time.monotonic() - began > 0.5
        end.join()
        undo()
