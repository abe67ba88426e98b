"""internals.py: what of vLLM's internals is there, and what is off without one."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

from glassbox.adapter import internals, protocols
from glassbox.adapter.internals import INTERNALS, Feature, Internal, lacks, line, members_of, switched_off


@dataclass
class Data:
    """Has fields."""

    field: int


class Vllm:
    """As one of vLLM's classes."""

    annotated: int
    there = 1

    def __init__(self) -> None:
        self.own, self.other = 1, 2
        self.typed: int = 3

    def method(self) -> None: ...


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    lacks.cache_clear()
    yield
    lacks.cache_clear()


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A loaded one, called vllm.made_up."""
    made = ModuleType("vllm.made_up")
    made.Vllm, made.Data = Vllm, Data  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.made_up", made)
    # What its methods set is read from its source, which is here.
    monkeypatch.setattr(internals, "_OWNERS", (*internals._OWNERS, __name__))
    return made


def declare(monkeypatch: pytest.MonkeyPatch, *entries: Internal) -> None:
    monkeypatch.setattr(internals, "INTERNALS", entries)


@pytest.mark.usefixtures("module")
class TestLacks:
    @pytest.mark.parametrize(
        "name", ["Vllm", "Vllm.annotated", "Vllm.there", "Vllm.own", "Vllm.typed", "Vllm.method", "Data.field"]
    )
    def test_there(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Names of a module, and whatever objects of a class have."""
        declare(monkeypatch, Internal(f"vllm.made_up.{name}", "vllm.made_up", Feature.TRACES))
        assert lacks(Feature.TRACES) == ()

    @pytest.mark.parametrize("name", ["gone", "Gone", "Vllm.gone", "Data.gone"])
    def test_gone(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is named, with what is off and what helps; other features don't mind."""
        declare(monkeypatch, Internal(f"vllm.made_up.{name}", "vllm.made_up", Feature.TRACES))
        assert lacks(Feature.TRACES) == (f"vllm.made_up.{name}",)
        assert lacks(Feature.TOKENS) == ()
        (told,) = switched_off("0.99.0")
        assert told == (
            f"vLLM 0.99.0 lacks what glassbox needs for traced requests: vllm.made_up.{name}; it is off. "
            "Use a glassbox that knows this vLLM, or a tested vLLM (docs/releases.md)"
        )

    def test_what_is_in_something_that_is_gone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Only the outermost is named."""
        paths = ("vllm.made_up.Gone", "vllm.made_up.Gone.field")
        declare(monkeypatch, *(Internal(path, "vllm.made_up", Feature.OBSERVATION) for path in paths))
        assert lacks(Feature.OBSERVATION) == ("vllm.made_up.Gone",)
        assert "the server runs unobserved" in line(Feature.OBSERVATION, "0.99.0")
        assert switched_off("0.99.0") == []  # of the core it is said elsewhere

    def test_a_module_that_is_gone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another one may do the same; one that only isn't loaded is not used here."""
        gone = Internal("vllm.nowhere.X", "vllm.nowhere", Feature.OBSERVATION)
        replaced = Internal("vllm.nowhere.Y", "vllm.nowhere", Feature.OBSERVATION, instead="json")
        unloaded = Internal("antigravity.Z", "antigravity", Feature.OBSERVATION)
        declare(monkeypatch, gone, replaced, unloaded)
        assert lacks(Feature.OBSERVATION) == ("vllm.nowhere.X",)
        assert "antigravity" not in sys.modules


class TestTable:
    def test_paths_are_unique(self) -> None:
        """Declared once."""
        paths = [entry.path for entry in INTERNALS]
        assert len(set(paths)) == len(paths)
        assert all(entry.path.startswith(f"{entry.module}.") for entry in INTERNALS)

    def test_members_of_a_protocol(self) -> None:
        """Attributes and methods that it declares itself."""
        assert members_of(protocols.V2Runner) == ["req_states", "prepare_inputs", "execute_model"]
        names: Any = members_of(protocols.AttentionBackend)
        assert names == ["forward_includes_kv_cache_update", "get_name"]
