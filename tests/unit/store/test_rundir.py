"""The run directory: with real processes and a real file system."""

import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from glassbox.store import process_name, rundir


def name_of(process: str, end: str = "0123456789abcdef") -> str:
    """Of the run directory of a server whose first process has this name."""
    return f"glassbox-{os.geteuid()}-{process}-{end}"


def elsewhere() -> str:
    """Name of a run directory whose owner would be dead if it were on this machine."""
    namespace, machine = process_name.own_place().split("-")
    return name_of(f"4194999-1-{namespace}-{int(machine, 16) ^ 1:08x}")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "runtime"
    path.mkdir()
    return path


@pytest.fixture
def environ(base: Path) -> dict[str, str]:
    return {"XDG_RUNTIME_DIR": str(base)}


class TestRunDir:
    def test_first_process_names_it(self, environ: dict[str, str], base: Path) -> None:
        """The path names this process and is set for its children; nothing is made."""
        path = rundir.run_dir(environ)
        assert path.parent == base
        assert path.name.split("-")[:3] == ["glassbox", str(os.geteuid()), str(os.getpid())]
        assert environ["GLASSBOX_RUN_DIR"] == str(path)
        assert list(base.iterdir()) == []

    def test_nobody_can_foretell_it(self, environ: dict[str, str]) -> None:
        """Who knows the process can't take the name first: there are 64 random bits in it."""
        names = {rundir.run_dir(dict(environ)).name for _ in range(8)}
        assert len(names) == 8
        assert len({name.rpartition("-")[0] for name in names}) == 1

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a directory of another user")
    def test_another_users_runtime_directory(
        self, environ: dict[str, str], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As after sudo: root may write there, but he to whom it belongs may rename and replace what root makes."""
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        os.chown(base, 65534, -1)
        assert rundir.run_dir(environ).parent == tmp_path

    def test_children_inherit(self, environ: dict[str, str]) -> None:
        """A child process has the same run directory."""
        path = rundir.run_dir(environ)
        child = subprocess.run(
            [sys.executable, "-c", "from glassbox.store.rundir import run_dir; print(run_dir())"],
            env={**os.environ, **environ},
            capture_output=True,
            text=True,
            check=True,
        )
        assert child.stdout.strip() == str(path)

    def test_temporary_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a usable XDG_RUNTIME_DIR it is in the temporary directory."""
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        for runtime in ("", "relative", str(tmp_path / "nowhere")):
            path = rundir.run_dir({"XDG_RUNTIME_DIR": runtime})
            assert path.parent == tmp_path

    def test_operators_choice(self, tmp_path: Path) -> None:
        """GLASSBOX_RUN_DIR is taken as it is, an empty one as none."""
        assert rundir.run_dir({"GLASSBOX_RUN_DIR": str(tmp_path / "x")}) == tmp_path / "x"
        empty = {"GLASSBOX_RUN_DIR": "", "XDG_RUNTIME_DIR": str(tmp_path)}
        assert rundir.run_dir(empty).parent == tmp_path


class TestElsewhere:
    """Ray takes GLASSBOX_RUN_DIR to the workers of other nodes."""

    @pytest.fixture
    def carried(self) -> str:
        """What the variable says on another node."""
        return f"/run/user/4242/{elsewhere()}"

    def test_same_name_where_theirs_are(self, environ: dict[str, str], base: Path, carried: str) -> None:
        """All workers of the server on a node share one directory; the path of the other node is not taken."""
        environ["GLASSBOX_RUN_DIR"] = carried
        assert rundir.is_elsewhere(environ)
        assert rundir.create(environ) == base / Path(carried).name
        assert environ["GLASSBOX_RUN_DIR"] == carried, "processes that it is passed on to find the same"

    def test_it_is_not_purged(self, environ: dict[str, str], base: Path, carried: str) -> None:
        """That there is no such process here doesn't make it a dead server's, nor this process's to remove."""
        environ["GLASSBOX_RUN_DIR"] = carried
        path = rundir.create(environ)
        assert rundir.purge_dead(base) == []
        assert not rundir.remove(environ)
        assert path.is_dir()

    def test_here(self, environ: dict[str, str], tmp_path: Path) -> None:
        """Neither this machine's own, nor one that an operator named, nor none at all is elsewhere."""
        assert not rundir.is_elsewhere(environ)
        rundir.run_dir(environ)
        assert not rundir.is_elsewhere(environ)
        assert not rundir.is_elsewhere({"GLASSBOX_RUN_DIR": str(tmp_path / "1-2-glassbox")})


class TestCreate:
    def test_private(self, environ: dict[str, str]) -> None:
        """The directory is for its user only; making it again is no error."""
        previous = os.umask(0)
        try:
            path = rundir.create(environ)
            assert rundir.create(environ) == path
        finally:
            os.umask(previous)
        assert stat.S_IMODE(path.stat().st_mode) == 0o700

    def test_an_open_one_is_closed(self, environ: dict[str, str]) -> None:
        """One of ours that others could read is made private."""
        path = rundir.run_dir(environ)
        path.mkdir(mode=0o755)
        rundir.create(environ)
        assert stat.S_IMODE(path.stat().st_mode) == 0o700

    def test_symlink_attack(self, environ: dict[str, str], tmp_path: Path) -> None:
        """A symlink in its place is refused."""
        (tmp_path / "elsewhere").mkdir()
        rundir.run_dir(environ).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(PermissionError, match="must be a directory, not a symlink; remove it or set"):
            rundir.create(environ)
        assert list((tmp_path / "elsewhere").iterdir()) == []

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a directory of another user")
    def test_foreign(self, environ: dict[str, str]) -> None:
        """One that belongs to another user is refused."""
        rundir.run_dir(environ).mkdir()
        os.chown(rundir.run_dir(environ), 65534, -1)
        with pytest.raises(PermissionError, match="must belong to user 0, but belongs to user 65534"):
            rundir.create(environ)

    def test_file_in_its_place(self, environ: dict[str, str]) -> None:
        """A file in its place is an error, not overwritten."""
        rundir.run_dir(environ).write_text("mine")
        with pytest.raises(OSError, match="glassbox-"):
            rundir.create(environ)
        assert rundir.run_dir(environ).read_text() == "mine"

    def test_operators_choice(self, tmp_path: Path) -> None:
        """A directory that the operator names is made with what is above it."""
        path = tmp_path / "a" / "b"
        assert rundir.create({"GLASSBOX_RUN_DIR": str(path)}) == path
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


class TestRemove:
    def test_owner(self, environ: dict[str, str]) -> None:
        """The owner removes it with what is in it; the second time there is nothing to do."""
        path = rundir.create(environ)
        (path / "worker.npz").touch()
        assert rundir.remove(environ)
        assert not path.exists()
        assert not rundir.remove(environ)

    def test_other_process(self, environ: dict[str, str]) -> None:
        """A child does not remove its parent's."""
        path = rundir.create(environ)
        subprocess.run(
            [sys.executable, "-c", "from glassbox.store import rundir; assert not rundir.remove()"],
            env={**os.environ, **environ},
            check=True,
        )
        assert path.is_dir()

    def test_operators_choice(self, tmp_path: Path) -> None:
        """What the operator named stays."""
        environ = {"GLASSBOX_RUN_DIR": str(tmp_path / "x")}
        path = rundir.create(environ)
        assert not rundir.remove(environ)
        assert path.is_dir()


class TestPurgeDead:
    @pytest.fixture
    def child(self, environ: dict[str, str]) -> Iterator[tuple[subprocess.Popen[str], Path]]:
        """A living process with its run directory."""
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from glassbox.store import rundir; print(rundir.create(), flush=True); input()",
            ],
            env={**os.environ, "GLASSBOX_RUN_DIR": "", **environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()
        process.communicate()

    def test_dead_owner(self, child: tuple[subprocess.Popen[str], Path], base: Path) -> None:
        """A living server's directory stays; when the server was killed, it goes."""
        process, path = child
        (path / "worker.npz").touch()
        assert rundir.purge_dead(base) == []
        assert path.is_dir()
        process.kill()
        process.wait()
        assert rundir.purge_dead(base) == [path]
        assert not path.exists()

    def test_recycled_pid(self, environ: dict[str, str], base: Path) -> None:
        """A living process with the pid of a dead owner does not keep its directory."""
        path = rundir.create(environ)
        pid, start, place = process_name.own_name().split("-", 2)
        old = base / name_of(f"{pid}-{int(start) - 1}-{place}")
        old.mkdir()
        assert rundir.purge_dead(base) == [old]
        assert path.is_dir()

    def test_left_alone(self, environ: dict[str, str], base: Path, tmp_path: Path) -> None:
        """Other names, pid namespaces (containers), machines, files and symlinks stay, and what they lead to."""
        rundir.create(environ)
        namespace, machine = process_name.own_place().split("-")
        target = tmp_path / "target"
        target.mkdir()
        (base / name_of(f"4194999-1-{int(namespace) + 1}-{machine}")).mkdir()
        (base / elsewhere()).mkdir()
        (base / "notes").mkdir()
        (base / name_of(f"4194999-2-{namespace}-{machine}")).touch()
        (base / name_of(f"4194999-3-{namespace}-{machine}")).symlink_to(target)
        before = sorted(base.iterdir())
        assert rundir.purge_dead(base) == []
        assert sorted(base.iterdir()) == before
        assert target.is_dir()

    def test_abandoned_elsewhere(self, environ: dict[str, str], base: Path) -> None:
        """A server of another machine is dead when its workers here have written nothing for a day."""
        path = base / elsewhere()
        path.mkdir()
        hours_ago = time.time() - 23 * 3600
        os.utime(path, (hours_ago, hours_ago))
        assert rundir.purge_dead(base) == []
        days_ago = time.time() - 25 * 3600
        os.utime(path, (days_ago, days_ago))
        assert rundir.purge_dead(base) == [path]

    def test_no_parent(self, tmp_path: Path) -> None:
        """Without any run directory there is nothing to do."""
        assert rundir.purge_dead(tmp_path / "nowhere") == []
