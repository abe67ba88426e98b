"""tools/compat_watch.py: what glassbox uses of vLLM, and what a release lacks of it."""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

import pytest

from tools import compat_watch, vllm_releases
from tools.compat_watch import changed, entry_of, missing, not_called, to_look_for, undeclared, worth_a_line
from tools.vllm_tree import Tree
from tools.vllm_uses import attributes_asked_for, used_names

USER: Final = '''
from typing import Protocol

from vllm.config import VllmConfig
from vllm.v1 import registry
import vllm.envs as envs


class Runner(Protocol):
    """vllm.v1.gpu.Runner, vllm.v1.cpu.Runner.

    Not vllm.v1.tpu.Runner.
    """

    batch: int

    def execute(self): ...


class Own(Protocol):
    """Of nobody."""

    other: int


TABLE = (("vllm.v1.worker", "Worker"), Patch("vllm.v1.engine", "Engine", "add", "around_add"))


def read():
    from vllm import _ops as ops

    return ops.write(registry.Enum.CUSTOM.value, envs.PORT, VllmConfig)
'''
RELEASE: Final = {
    "__init__": "from vllm.engine import Engine\nfrom torch import Tensor",
    "_version": "__version__ = version = '9.1.0'",
    "base": "class Base:\n    inherited = 1\n    def run(self, a, b=None, *args, **kw): ...",
    "stars": "from .base import *",
    "circle": "from vllm.ring import Ring",
    "ring": "from vllm.circle import Ring",
    "engine": (
        "from vllm.base import Base\nclass Engine(Base):\n    field: int\n    def __init__(self): self.own = {}\n"
        "    @property\n    def made(self): ...\ndef mark(layer): layer.isa = 'vec'"
    ),
}


def tree(folder: Path, modules: Mapping[str, str]) -> Path:
    """A release of vLLM with these modules."""
    (folder / "vllm").mkdir(parents=True)
    for name, text in modules.items():
        (folder / "vllm" / f"{name}.py").write_text(text, encoding="utf-8")
    return folder


class Feature(Enum):
    """What needs internals."""

    TRACES = "traced requests"


@dataclass(frozen=True)
class Entry:
    """A declaration."""

    path: str
    module: str = "vllm"
    serves: Feature = Feature.TRACES
    required: bool = False
    alternatives: tuple[str, ...] = ()
    since: str = ""


def names(*paths: str) -> dict[str, str]:
    """As `used_names` has them."""
    return dict.fromkeys(paths, "user.py:1")


class TestUsedNames:
    @pytest.fixture
    def found(self, tmp_path: Path) -> Mapping[str, str]:
        (tmp_path / "package").mkdir()
        (tmp_path / "package" / "user.py").write_text(USER, encoding="utf-8")
        return {k: v for k, v in used_names(tmp_path / "package").items() if "AttentionBackendEnum" not in k}

    def test_imports_and_what_is_read_of_them(self, found: Mapping[str, str]) -> None:
        """Under the names that they were given, at the top and inside of functions."""
        assert {
            "vllm.config.VllmConfig",
            "vllm.v1.registry",
            "vllm.v1.registry.Enum.CUSTOM.value",
            "vllm.envs",
            "vllm.envs.PORT",
            "vllm._ops",
            "vllm._ops.write",
        } <= set(found)
        assert "package/user.py:5" == found["vllm.v1.registry"]

    def test_members_of_protocols_in_each_class_that_they_name(self, found: Mapping[str, str]) -> None:
        """Those of the docstring's first paragraph; a protocol of our own has none."""
        assert {
            f"vllm.v1.{kind}.Runner{member}" for kind in ("gpu", "cpu") for member in ("", ".batch", ".execute")
        } == {name for name in found if "Runner" in name}
        assert not any(name.endswith("other") for name in found)

    def test_tables_of_names(self, found: Mapping[str, str]) -> None:
        """A module with what follows; the fourth entry of a patch is glassbox's own."""
        assert {"vllm.v1.worker.Worker", "vllm.v1.engine.Engine.add"} <= set(found)
        assert not any("around_add" in name for name in found)

    def test_declarations_are_no_use(self, tmp_path: Path) -> None:
        """What a module declares is used by others, or by nobody."""
        folder = tmp_path / "package" / "adapter"
        folder.mkdir(parents=True)
        for name in ("internals.py", "other.py"):
            (folder / name).write_text(f"Internal('vllm.{name[:5]}')", encoding="utf-8")
        assert {"vllm.other"} == {name for name in used_names(tmp_path / "package") if "Enum" not in name}

    def test_attributes_that_are_asked_for(self, tmp_path: Path) -> None:
        """With getattr and a default, or hasattr; not glassbox's own, nor those of Python's modules."""
        folder = tmp_path / "glassbox" / "adapter"
        folder.mkdir(parents=True)
        text = "getattr(impl, 'sinks', None)\nhasattr(a, 'impl')\ngetattr(i, 'glassbox_view', 0)\ngetattr(a, name)\n"
        text += "getattr(module.__spec__, '_initializing', False)\n"
        (folder / "user.py").write_text(text, encoding="utf-8")
        assert {"sinks": "glassbox/adapter/user.py:1", "impl": "glassbox/adapter/user.py:2"} == attributes_asked_for(
            folder
        )

    def test_what_glassbox_uses_is_found(self) -> None:
        """One of each kind, and each backend that can be observed."""
        assert {
            "vllm.v1.attention.backends.registry.AttentionBackendEnum.FLASHINFER",
            "vllm.v1.attention.backends.flash_attn.FlashAttentionImpl.forward",
            "vllm.v1.engine.async_llm.AsyncLLM.add_request",
            "vllm.forward_context.get_forward_context",
        } <= set(used_names())


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """The release that all tests only read."""
    return Tree(tree(tmp_path_factory.mktemp("release"), RELEASE))


class TestTree:
    @pytest.mark.parametrize(
        "path",
        [
            "vllm.Engine",  # imported from where it is
            "vllm.Engine.inherited",
            "vllm.engine.Engine.run",
            "vllm.engine.Engine.field",
            "vllm.engine.Engine.own",  # set on self
            "vllm.engine.Engine.made",
            "vllm.engine.isa",  # set on objects of others
            "vllm.engine.Engine.own.anything",  # of a value nothing is known
            "vllm.Tensor",  # not vLLM's
            "vllm.stars.Base.inherited",  # with all others
            "vllm.circle.Ring",  # nobody can tell
        ],
    )
    def test_it_has(self, release: Tree, path: str) -> None:
        """Whatever an object of the class would have."""
        assert release.find(path) is not None
        assert [] == missing(release, names(path))

    @pytest.mark.parametrize("path", ["vllm.gone", "vllm.Gone", "vllm.engine.Engine.gone", "vllm.engine.own"])
    def test_it_lacks(self, release: Tree, path: str) -> None:
        """A module, a class, an attribute; what a class sets on itself is not the module's."""
        assert release.find(path) is None

    def test_version(self, release: Tree, tmp_path: Path) -> None:
        """The release's own word; a checkout has none."""
        assert "9.1.0" == release.version
        assert "unknown" == Tree(tree(tmp_path, {"__init__": ""})).version

    def test_elsewhere(self, release: Tree) -> None:
        """Modules, classes, methods and what is set on self, the nearest first; what a function names is its own."""
        assert ["vllm.engine.Engine.own"] == release.elsewhere("own")
        assert ["vllm.base", "vllm.base.Base"] == release.elsewhere("base") + release.elsewhere("Base")
        assert ["vllm.engine.Engine.made"] == release.elsewhere("made")
        assert [] == release.elsewhere("isa")

    def test_the_nearest_first(self, tmp_path: Path) -> None:
        """Of many that are called so."""
        modules = {"__init__": "", **dict.fromkeys(("a", "b", "c"), "class Thing:\n    size = 1")}
        paths = Tree(tree(tmp_path, modules)).elsewhere("size", near="vllm.b.Other.size")
        assert ["vllm.b.Thing.size", "vllm.a.Thing.size", "vllm.c.Thing.size"] == paths

    def test_no_vllm_in_the_folder(self, tmp_path: Path) -> None:
        """The installed one is not taken instead."""
        with pytest.raises(ModuleNotFoundError):
            Tree(tmp_path)


class TestFindings:
    @pytest.fixture
    def later(self, tmp_path: Path) -> Path:
        """`run` has other parameters, `Engine` is elsewhere, `made` is a method."""
        engine = RELEASE["engine"].replace("class Engine", "class Core").replace("    @property\n", "")
        base = RELEASE["base"].replace("a, b=None", "b, a, c")
        return tree(
            tmp_path / "later", {**RELEASE, "engine": "", "core": engine + "\nclass Engine(Core): ...", "base": base}
        )

    def test_a_class_that_moved_is_said_once(self, tmp_path: Path, later: Path) -> None:
        """With where it is, and not once more for each of its attributes."""
        found = missing(Tree(later), names("vllm.engine.Engine", "vllm.engine.Engine.field", "vllm.core.Core"))
        assert ["vllm.engine.Engine", "vllm.engine.Engine.field"] == [finding.path for finding in found]
        (line,) = worth_a_line(found)
        assert "missing: Engine is in vllm.core.Engine" == line.what

    def test_other_parameters(self, tmp_path: Path, later: Path) -> None:
        """Which are new, gone, needed or elsewhere; what is the same is no finding."""
        before, after = Tree(tree(tmp_path / "before", RELEASE)), Tree(later)
        found = changed(after, before, names("vllm.base.Base.run", "vllm.base.Base", "vllm.base.Base.inherited"))
        (finding,) = found
        assert "vllm.base.Base.run" == finding.path
        assert finding.what == (
            "has a parameter c (positional or keyword, required); "
            "b was positional or keyword, is positional or keyword, required; "
            "order was self, a, b, args, kw, is self, b, a, args, kw"
        )
        (back,) = changed(before, after, names("vllm.base.Base.run"))
        assert back.what.startswith("lacks parameter c; ")
        assert [] == changed(before, before, names("vllm.base.Base.run"))

    def test_another_order(self, tmp_path: Path) -> None:
        """The same parameters, given by position."""
        before = Tree(tree(tmp_path / "before", {"__init__": "def run(a, b): ..."}))
        after = Tree(tree(tmp_path / "after", {"__init__": "def run(b, a): ..."}))
        (finding,) = changed(after, before, names("vllm.run"))
        assert "order was a, b, is b, a" == finding.what

    def test_another_kind(self, tmp_path: Path) -> None:
        """A function where there was a class."""
        before = Tree(tree(tmp_path / "before", {"__init__": "class Thing: ..."}))
        after = Tree(tree(tmp_path / "after", {"__init__": "def Thing(): ..."}))
        (finding,) = changed(after, before, names("vllm.Thing"))
        assert "was a class, is a function" == finding.what


class TestDeclarations:
    """RELEASE is 9.1; `Engine` has field, own, made, run and inherited."""

    def found(self, release: Tree, name: str, *entries: Entry) -> list[compat_watch.Finding]:
        return missing(release, names(name), entries)

    def test_another_module_where_its_own_is_gone(self, release: Tree) -> None:
        """Is enough; it is not for what its own module has no more."""
        for module, alternatives, lacks in (
            ("vllm.gone", ("vllm.lost", "vllm.engine"), 0),
            ("vllm.gone", ("vllm.lost",), 1),
            ("vllm.gone", (), 1),
            ("vllm.base", ("vllm.engine",), 1),
        ):
            entry = Entry(f"{module}.Motor", module, alternatives=alternatives)
            assert lacks == len(self.found(release, f"{module}.Motor", entry))
            assert lacks == len(self.found(release, f"{module}.Motor.run", entry))

    def test_a_name_that_is_newer_than_the_release(self, release: Tree) -> None:
        """Is said, and fails nothing."""
        (finding,) = self.found(release, "vllm.Engine.speed", Entry("vllm.Engine.speed", since="9.2"))
        assert not finding.fails
        assert finding.what == (
            "missing: nothing is called speed; traced requests needs it, and is not there in releases before 9.2"
        )
        for since in ("", "9.1", "8.99"):
            (finding,) = self.found(release, "vllm.Engine.speed", Entry("vllm.Engine.speed", since=since))
            assert finding.fails

    def test_what_is_lost(self, release: Tree) -> None:
        """A feature, or all of it."""
        for required, lost in ((False, "traced requests needs it"), (True, "nothing is observed without it")):
            (finding,) = self.found(release, "vllm.gone", Entry("vllm.gone", required=required))
            assert finding.fails
            assert finding.what == f"missing: nothing is called gone; {lost}"

    def test_the_nearest_declaration_counts(self) -> None:
        """A member's own goes before its class's; names that only begin alike are others."""
        entries = Entry("vllm.Engine"), Entry("vllm.Engine.speed", since="9.2")
        assert entries[1] == entry_of("vllm.Engine.speed", entries)
        assert entries[0] == entry_of("vllm.Engine.run", entries)
        assert entry_of("vllm.EngineCore", entries) is None

    def test_undeclared_names(self) -> None:
        """Neither declared, nor below a declared one that has no members declared, nor what holds a declared one."""
        used = names(
            "vllm.envs",
            "vllm.envs.PORT",
            "vllm.envs.HOST",
            "vllm.Engine.run",
            "vllm.Kind",
            "vllm.Kind.A",
            "vllm.Kind.B",
        )
        entries = (Entry("vllm.envs.PORT"), Entry("vllm.Engine"), Entry("vllm.Kind"), Entry("vllm.Kind.A"))
        found = undeclared(used, entries)
        assert ["vllm.envs.HOST", "vllm.Kind.B"] == [finding.path for finding in found]
        assert "not declared: add it to glassbox/adapter/internals.py" == found[0].what

    def test_declared_names_are_looked_for(self, release: Tree) -> None:
        """Also those that code reaches by their declaration alone."""
        entries = (Entry("vllm.gone"), Entry("vllm.Engine"))
        looked_for = to_look_for(names("vllm.Engine"), entries)
        assert {"vllm.gone": "glassbox/adapter/internals.py", "vllm.Engine": "user.py:1"} == looked_for
        assert ["vllm.gone"] == [finding.path for finding in missing(release, looked_for, entries)]

    def test_attributes_that_nobody_has(self, release: Tree) -> None:
        """They are said and fail nothing."""
        (finding,) = not_called(release, names("isa", "sinks"))
        assert ("sinks", False) == (finding.path, finding.fails)


class TestCommand:
    @pytest.fixture(autouse=True)
    def nothing_declared(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Other than glassbox's own uses and declarations, which are no matter here."""
        monkeypatch.setattr(compat_watch, "declared", lambda: ())
        monkeypatch.setattr(compat_watch, "attributes_asked_for", dict)

    def test_a_wheel_that_lacks_names_fails(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Each release has a line, and what it lacks; one that lacks nothing returns 0."""
        folder = tree(tmp_path / "old", RELEASE)
        wheel = tmp_path / "vllm-9.1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for path in folder.rglob("*.py"):
                archive.write(path, path.relative_to(folder))
        monkeypatch.setattr(compat_watch, "used_names", lambda: names("vllm.Engine", "vllm.Engine.speed"))
        assert 1 == compat_watch.main([str(wheel), str(folder), "--reference", str(folder)])
        line = "vLLM 9.1.0: has 1 of 2 names that glassbox uses; 0 called otherwise than in 9.1.0\n"
        line += "  vllm.Engine.speed (user.py:1)\n    missing: nothing is called speed\n"
        assert line * 2 == capsys.readouterr().out
        monkeypatch.setattr(compat_watch, "used_names", lambda: names("vllm.Engine"))
        assert 0 == compat_watch.main([str(wheel), "--reference", str(folder)])

    def test_a_release_by_its_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Of those that are supported, which are fetched; `all` is each of them."""
        folder = tree(tmp_path, RELEASE)
        monkeypatch.setattr(compat_watch, "used_names", lambda: names("vllm.Engine"))
        monkeypatch.setattr(vllm_releases, "folder_of", lambda release, *, whole: folder)
        assert 0 == compat_watch.main(["all", "--reference", str(folder)])
        lines = capsys.readouterr().out.splitlines()
        assert ["vLLM 9.1.0: has 1 of 1 names that glassbox uses; 0 called otherwise than in 9.1.0"] * 8 == lines

    def test_declared(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        """A name that is used and not declared fails by itself."""
        monkeypatch.setattr(compat_watch, "used_names", lambda: names("vllm.Engine", "vllm.Motor"))
        for entry, status in ((Entry("vllm.Engine"), 1), (Entry("vllm"), 0)):
            monkeypatch.setattr(compat_watch, "declared", lambda entry=entry: (entry,))
            assert status == compat_watch.main(["--declared"])
        assert (
            "glassbox uses 2 names of vLLM, of which 1 are not declared\n  vllm.Motor (user.py:1)\n"
            "    not declared: add it to glassbox/adapter/internals.py\n"
            "glassbox uses 2 names of vLLM, of which 0 are not declared\n"
        ) == capsys.readouterr().out

    @pytest.mark.parametrize("arguments", [["{folder}"], []])
    def test_neither_release_nor_wheel_nor_folder(
        self, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """It says what it wants."""
        with pytest.raises(SystemExit):
            compat_watch.main([text.format(folder=tmp_path) for text in arguments])
        said = capsys.readouterr().err
        assert ("or give a wheel, or a folder that holds vllm/" in said) or ("name a release" in said)
