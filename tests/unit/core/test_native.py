"""Compiling a C++ file: once per CPU and source, whatever the machine lacks."""

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from glassbox.core import logs, native
from glassbox.core.native import NativeError, compile_cpp, load_cpp
from tests.export_samples import logged

SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "cache" / "glassbox" / "native"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that the compiler was run with."""
    seen: list[list[str]] = []
    run = subprocess.run

    def recorded(command: list[str], **options: object) -> object:
        seen.append(command)
        return run(command, **options)

    monkeypatch.setattr(native.subprocess, "run", recorded)
    return seen


def test_compiled_once(source: Path, cache: Path, runs: list[list[str]]) -> None:
    """The second time the file is there; nothing else is left in the cache."""
    assert load_cpp(source).answer() == 42
    assert load_cpp(source).answer() == 42
    assert len(runs) == 1
    assert [path.suffix for path in cache.iterdir()] == [".so"]


def test_another_source_or_cpu_is_another_file(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code for one CPU may not run on another one that shares the home."""
    load_cpp(source)
    source.write_text(SOURCE.replace("42", "43"))
    assert load_cpp(source).answer() == 43
    monkeypatch.setattr(native, "cpu_flags", lambda: frozenset({"another"}))
    load_cpp(source)
    assert len(list(cache.iterdir())) == 3


def test_definitions(source: Path, cache: Path, runs: list[list[str]]) -> None:
    """Macros stand for what they are given, commas and quotes too; other definitions are another file."""
    source.write_text(
        'enum { NAMES };\nextern "C" int answer() { return SECOND; }\nextern "C" const char text[] = TEXT;\n'
    )
    first, second = ({"NAMES": f"FIRST,SECOND={n}", "TEXT": '"a b, c"'} for n in (1, 2))
    library = load_cpp(source, first)
    assert (library.answer(), ctypes.c_char_p(ctypes.addressof(ctypes.c_char.in_dll(library, "text"))).value) == (
        1,
        b"a b, c",
    )
    assert load_cpp(source, second).answer() == 2
    assert load_cpp(source, first).answer() == 1
    assert len(runs) == len(list(cache.iterdir())) == 2


def test_a_cache_that_cannot_be_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled all the same, and nothing is left."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(native.tempfile, "tempdir", str(tmp_path / "tmp"))
    assert load_cpp(source).answer() == 42
    assert not list((tmp_path / "tmp").iterdir())


def test_no_home(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container with a user id that nobody knows."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(native.os, "getuid", lambda: 123_456)
    with pytest.raises(RuntimeError):
        Path.home()
    assert load_cpp(source).answer() == 42


def test_words_of_cxx(source: Path, monkeypatch: pytest.MonkeyPatch, runs: list[list[str]]) -> None:
    """CXX may hold options, as for ccache."""
    monkeypatch.setenv("CXX", "g++ -DGLASSBOX=1")
    load_cpp(source)
    assert runs[0][1] == "-DGLASSBOX=1"


def test_no_compiler(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Says what was looked for and what to do."""
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    with pytest.raises(NativeError, match=r"none of g\+\+, clang\+\+, c\+\+ is on PATH; install g\+\+ or set CXX"):
        load_cpp(source)
    monkeypatch.setenv("CXX", "icx")
    with pytest.raises(NativeError, match="none of icx is on PATH"):
        load_cpp(source)


def test_a_source_that_does_not_compile(source: Path, cache: Path) -> None:
    """The compiler's first error; nothing stays in the cache."""
    source.write_text("int answer( {")
    with pytest.raises(NativeError, match=r"g\+\+ can't compile answer.cpp: .*error"):
        load_cpp(source)
    assert not list(cache.iterdir())


def test_a_target_that_the_compiler_does_not_know(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Falls back to what it knows."""
    monkeypatch.setattr(native, "_TARGETS", (("-march=nonsense",), ()))
    assert load_cpp(source).answer() == 42


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file of another user")
FOREIGN = 65534


@pytest.fixture
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary directory, in which nothing may be left."""
    path = tmp_path / "tmp"
    path.mkdir(mode=0o700)
    monkeypatch.setattr(native.tempfile, "tempdir", str(path))
    return path


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged, once for each text however often."""
    native.logger.__dict__.pop(logs._ONCE_ATTRIBUTE, None)

    def messages() -> list[str]:
        return logged(caplog.records)

    return messages


def planted(cache: Path, source: Path) -> Path:
    """A library that answers 666, where the right one would lie."""
    with pytest.MonkeyPatch.context() as patch:
        # Not loaded: the loader would take what it has for the other file of that name.
        patch.setattr(native.ctypes, "CDLL", str)
        load_cpp(source)
    (path,) = cache.iterdir()
    evil = source.with_name("evil.cpp")
    evil.write_text(SOURCE.replace("42", "666"))
    subprocess.run(["g++", "-shared", "-fPIC", str(evil), "-o", str(path)], check=True)
    return path


class TestWhoCouldHavePutItThere:
    """The library is run: one that another user could have put in its place is not loaded."""

    def test_this_user_could(self, source: Path, cache: Path) -> None:
        """What the other tests of this class plant would be loaded if it were this user's."""
        planted(cache, source)
        assert load_cpp(source).answer() == 666

    @as_root
    def test_another_users_file(self, source: Path, cache: Path) -> None:
        """It is compiled again, and replaces that one."""
        path = planted(cache, source)
        os.chown(path, FOREIGN, -1)
        assert load_cpp(source).answer() == 42
        assert path.stat().st_uid == 0

    @pytest.mark.parametrize("mode", [0o664, 0o646, 0o777])
    def test_a_file_that_others_may_write(self, source: Path, cache: Path, mode: int) -> None:
        """The same."""
        planted(cache, source).chmod(mode)
        assert load_cpp(source).answer() == 42

    def test_a_link(self, source: Path, cache: Path, tmp_path: Path) -> None:
        """Also to a file of this user's."""
        path = planted(cache, source)
        path.rename(tmp_path / "elsewhere.so")
        path.symlink_to(tmp_path / "elsewhere.so")
        assert load_cpp(source).answer() == 42
        assert not path.is_symlink()

    @as_root
    @pytest.mark.parametrize("above", [0, 1, 2])
    def test_another_users_folder(
        self, source: Path, cache: Path, private: Path, said: Callable[[], list[str]], above: int
    ) -> None:
        """Wherever above the file it is: compiled in private, and it says which folder and what to do."""
        planted(cache, source)
        folder = (cache, *cache.parents)[above]
        os.chown(folder, FOREIGN, -1)
        assert load_cpp(source).answer() == 42
        assert list(private.iterdir()) == []
        (message,) = said()
        assert f"compiled at each start: {folder} belongs to user {FOREIGN}, who could put code there; " in message
        assert "set XDG_CACHE_HOME" in message

    def test_a_folder_that_others_may_write(
        self, source: Path, cache: Path, private: Path, said: Callable[[], list[str]]
    ) -> None:
        """A shared cache, as of a cluster."""
        planted(cache, source)
        shared = cache.parents[1]
        shared.chmod(0o777)
        assert load_cpp(source).answer() == 42
        (message,) = said()
        assert f"{shared} is writable by other users (mode 0777), who could put code there" in message
        shared.chmod(0o1777)
        assert load_cpp(source).answer() == 666, "as below /tmp: what is this user's there can't be replaced"

    def test_glassboxs_own_are_closed(self, source: Path, cache: Path, said: Callable[[], list[str]]) -> None:
        """A umask of 002 leaves folders that the group may write to."""
        before = os.umask(0o002)
        try:
            load_cpp(source)
        finally:
            os.umask(before)
        for folder in (cache, cache.parent):
            folder.chmod(0o775)
        assert load_cpp(source).answer() == 42
        assert [stat.S_IMODE(folder.stat().st_mode) for folder in (cache, cache.parent)] == [0o755, 0o755]
        assert said() == []

    @as_root
    def test_a_link_on_the_way(
        self, source: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """This user's home may be a link; another user's link leads where he likes, tomorrow elsewhere."""
        planted(cache, source)
        (tmp_path / "link").symlink_to(tmp_path / "cache")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "link"))
        assert load_cpp(source).answer() == 666
        os.chown(tmp_path / "link", FOREIGN, -1, follow_symlinks=False)
        assert load_cpp(source).answer() == 42

    def test_a_namespace_without_root(self) -> None:
        """As in Apptainer: the folders above belong to nobody there, who is root; nobody's own is not trusted."""
        program = (
            "import codecs, ctypes, os, sys; from pathlib import Path\n"
            "from glassbox.core.trusted_path import distrusted_folder\n"
            "codecs.lookup('ascii')\n"  # later it may not be readable
            "libc, user = ctypes.CDLL(None), os.geteuid() or 12345\n"
            "os.setresuid(user, user, user)\n"
            "libc.prctl(4, 1, 0, 0, 0)\n"  # PR_SET_DUMPABLE, which a change of user takes away
            "if libc.unshare(0x10000000): sys.exit('no')\n"  # CLONE_NEWUSER
            "Path('/proc/self/uid_map').write_text(f'{user} {user} 1')\n"
            "print(os.stat('/usr').st_uid, distrusted_folder(Path('/usr/none')), distrusted_folder(Path('/usr')))"
        )
        run = [sys.executable, "-c", program]
        done = subprocess.run(run, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
        if done.returncode:
            pytest.skip(f"this machine allows no user namespaces: {done.stderr[-200:]}")
        assert done.stdout.strip() == "65534 None /usr belongs to user 65534"


class TestNoexec:
    """A file system from which nothing may be executed."""

    @pytest.fixture
    def mount(self) -> Iterator[Callable[[Path, str], Path]]:
        with contextlib.ExitStack() as stack:

            def mount(folder: Path, options: str) -> Path:
                folder.mkdir(parents=True, exist_ok=True)
                command = ["mount", "-t", "tmpfs", "-o", f"mode=0700,{options}", "tmpfs", str(folder)]
                if subprocess.run(command, capture_output=True, check=False).returncode != 0:
                    pytest.skip("mounting a tmpfs needs privileges that this user does not have")
                stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
                return folder

            yield mount

    def test_the_cache(
        self,
        source: Path,
        cache: Path,
        private: Path,
        runs: list[list[str]],
        mount: Callable[[Path, str], Path],
        said: Callable[[], list[str]],
    ) -> None:
        """The first load and later ones are the same: compiled elsewhere; one line names noexec, path and remedy."""
        mount(cache.parents[1], "noexec")
        before = len(runs)
        assert [load_cpp(source).answer() for _ in range(3)] == [42, 42, 42]
        assert len(runs) == before + 3
        assert list(private.iterdir()) == []
        (message,) = said()
        assert message == (
            f"The compiled kernel can't be kept, and is compiled at each start: {cache} is on a file system that is "
            "mounted noexec; set XDG_CACHE_HOME to a directory of this user's from which files can be executed"
        )

    def test_both(self, source: Path, cache: Path, private: Path, mount: Callable[[Path, str], Path]) -> None:
        """An error that names both, at the first load and at later ones."""
        mount(cache.parents[1], "noexec")
        mount(private, "noexec")
        for _ in range(2):
            with pytest.raises(NativeError) as error:
                load_cpp(source)
            assert f"{cache} is on a file system that is mounted noexec" in str(error.value)
            assert f"{private} is on a file system that is mounted noexec" in str(error.value)
            assert "set XDG_CACHE_HOME or TMPDIR to such a directory" in str(error.value)

    def test_a_cache_that_was_executable_once(
        self, source: Path, cache: Path, private: Path, runs: list[list[str]], mount: Callable[[Path, str], Path]
    ) -> None:
        """A library that lies there already changes nothing."""
        folder = mount(cache.parents[1], "exec")
        load_cpp(source)
        subprocess.run(["mount", "-o", "remount,noexec", str(folder)], check=True)
        before = len(runs)
        assert [load_cpp(source).answer() for _ in range(2)] == [42, 42]
        assert len(runs) == before + 2

    def test_a_cache_that_is_read_only(
        self,
        source: Path,
        cache: Path,
        private: Path,
        mount: Callable[[Path, str], Path],
        said: Callable[[], list[str]],
    ) -> None:
        """As in a container with a read-only root; a library that was put there beforehand is loaded."""
        folder = mount(cache.parents[1], "rw")
        planted(cache, source)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        assert load_cpp(source).answer() == 666
        source.write_text(SOURCE.replace("42", "43"))
        assert load_cpp(source).answer() == 43
        (message,) = said()
        assert f"{cache} can't be used: Read-only file system; set XDG_CACHE_HOME" in message


def test_a_damaged_library(source: Path, cache: Path) -> None:
    """One that can't be loaded is compiled again, not left there for ever."""
    path = planted(cache, source)
    path.write_bytes(b"\x7fELF and nothing else")
    assert load_cpp(source).answer() == 42
    assert load_cpp(source).answer() == 42


class TestTogether:
    """Several workers of a machine, and threads of one, may want the same file at once."""

    PROGRAM = (
        "import sys; from pathlib import Path; from glassbox.core.native import load_cpp\n"
        "print(load_cpp(Path(sys.argv[1])).answer())"
    )

    @pytest.fixture
    def compiler(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A compiler that takes its time; the file has a line for each run."""
        command, told = tmp_path / "slow-g++", tmp_path / "runs"
        command.write_text(f'#!/bin/sh\necho run >> "{told}"\nsleep 1\nexec g++ "$@"\n')
        command.chmod(0o755)
        monkeypatch.setenv("CXX", str(command))
        return told

    def test_processes_compile_once(self, source: Path, compiler: Path) -> None:
        """Three start together; a fourth comes later."""
        command = [sys.executable, "-c", self.PROGRAM, str(source)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}

        def started() -> "subprocess.Popen[str]":
            return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

        together = [started() for _ in range(3)]
        assert ["42\n"] * 3 == [process.communicate(timeout=300)[0] for process in together]
        assert "42\n" == started().communicate(timeout=300)[0]
        assert ["run"] == compiler.read_text().split()

    def test_a_file_that_was_compiled_ahead_is_waited_for(self, source: Path, compiler: Path) -> None:
        """By whoever loads it meanwhile; compiling it once more does nothing."""
        thread = threading.Thread(target=compile_cpp, args=(source,))
        thread.start()
        while not compiler.exists():
            time.sleep(0.01)
        assert 42 == load_cpp(source).answer()
        thread.join()
        compile_cpp(source)
        assert ["run"] == compiler.read_text().split()

    def test_whoever_holds_the_lock_for_ever_keeps_nobody(
        self, source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A process that was stopped; a file system without locks."""
        load_cpp(source)
        source.write_text(SOURCE.replace("42", "43"))
        monkeypatch.setattr(native, "_LONGEST_WAIT_S", 0.1)
        held = os.open(cache, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            assert 43 == load_cpp(source).answer()
        finally:
            os.close(held)

        def no_locks(_handle: int, _operation: int) -> None:
            raise OSError(errno.ENOLCK, "no locks available")

        monkeypatch.setattr(native.fcntl, "flock", no_locks)
        source.write_text(SOURCE.replace("42", "44"))
        assert 44 == load_cpp(source).answer()

    def test_ahead_where_the_cache_cannot_be_used(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[list[str]]
    ) -> None:
        """Nothing is compiled that nobody could find."""
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        with pytest.raises(NativeError, match="set XDG_CACHE_HOME"):
            compile_cpp(source)
        assert [] == runs
