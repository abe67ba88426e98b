"""Compiling a C++ file: once per CPU and source, whatever the machine lacks."""

import ctypes
import subprocess
from pathlib import Path

import pytest

from glassbox.core import native
from glassbox.core.native import NativeError, load_cpp

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
