"""On a vLLM of the future everything is served, what can be observed still is, and the rest is named in the log."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from tests.releases.future import VARIANTS, VERSION, Edit, make_future
from tools.vllm_releases import Release, compared_with

pytestmark = pytest.mark.integration

Smoke = Callable[[Release], dict[str, Any]]
ALL_OBSERVED: Final = {"observed": 30, "bypassed": {}}


# A process each. What is gone and what is only called otherwise don't disturb each other.
SMALL, CORE, TRANSPOSED, HALVES = ("optional", "builder"), ("core",), ("transposed",), ("halves",)
Future = Callable[[tuple[str, ...]], dict[str, Any]]


@pytest.fixture(scope="session")
def future(smoke_of: Callable[[Path], dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Future:
    """Gives what the smoke program prints with the installed vLLM and some variants' changes; runs it once."""
    made: dict[tuple[str, ...], Path] = {}

    def run(variants: tuple[str, ...]) -> dict[str, Any]:
        if variants not in made:
            made[variants] = make_future(tmp_path_factory.mktemp("-".join(variants)) / "tree", *variants)
        return smoke_of(made[variants])

    return run


def said(run: dict[str, Any], *words: str) -> list[str]:
    """Lines of the log that have all these words."""
    return [line for line in run["log"].splitlines() if all(word in line for word in words)]


def assert_measures_the_same(run: dict[str, Any], expected: dict[str, Any]) -> None:
    """From when the layers' output was reproduced on, which is in the first prefills: every number, bit for bit.

    Until then nothing of a release on probation is counted, and its traces have no values.
    """
    assert ALL_OBSERVED == run["measured"]["layers"]
    assert {} == run["measured"]["errors"]
    assert 0 < run["measured"]["rows"]["prefill"] < expected["measured"]["rows"]["prefill"]
    assert decode(expected["measured"]) == decode(run["measured"])
    for part in ("status", "prompt_len", "num_generated", "truncated", "positions"):
        assert expected["trace"][part] == run["trace"][part]
    assert decode(expected["trace"]) == decode(run["trace"])


def decode(part: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What of a result's tables is of the phase decode."""
    tables = {name: table for name, table in part.items() if isinstance(table, dict)}
    found = {
        name: {key: value for key, value in table.items() if key.rpartition(".")[2] == "decode"}
        for name, table in tables.items()
    }
    return {name: table for name, table in found.items() if table}


def test_all_variants_are_run() -> None:
    """Those that a test would forget are none."""
    assert set(VARIANTS) == {name for variants in (SMALL, CORE, TRANSPOSED, HALVES) for name in variants}


def test_a_change_that_does_not_fit() -> None:
    """Is said: a variant that changes nothing would prove nothing."""
    with pytest.raises(ValueError, match=r"a\.py must have 'gone'; mend the variant in tests/releases/future\.py"):
        Edit("a.py", "gone", "new").apply("text")


def caches(*variants: tuple[str, ...]) -> list[Any]:
    """Parameters of a test; one way to lay out a cache is enough for `make test`."""
    long = (pytest.mark.slow, pytest.mark.releases)
    return [pytest.param(one, id="-".join(one), marks=long if one == HALVES else ()) for one in variants]


@pytest.mark.parametrize("variants", caches(SMALL, CORE, TRANSPOSED, HALVES))
def test_serves_the_same_tokens(future: Future, smoke: Smoke, variants: tuple[str, ...]) -> None:
    """Whatever becomes of the observation."""
    run = future(variants)
    assert VERSION == run["vllm"]
    assert smoke(compared_with())["tokens"] == run["tokens"]


def test_what_is_optional_or_only_passed_on(future: Future, smoke: Smoke) -> None:
    """What is gone switches off what needs it, with one line that names both; all else is as it was."""
    run = future(SMALL)
    assert 1 == len(said(run, "lacks what glassbox needs", "CachedRequestState.output_token_ids", "it is off"))
    assert_measures_the_same(run, smoke(compared_with()))


def test_a_core_internal_that_is_gone(future: Future) -> None:
    """The server runs unobserved, and one line says why."""
    run = future(CORE)
    assert not run["measured"]["attached"]
    assert 1 == len(said(run, "GPUModelRunner.execute_model", "the server runs unobserved"))


@pytest.mark.parametrize("variants", caches(TRANSPOSED, HALVES))
def test_a_cache_that_is_laid_out_otherwise(future: Future, smoke: Smoke, variants: tuple[str, ...]) -> None:
    """Is read as it is, or its layers are bypassed and the log says why; never is it read wrongly."""
    run = future(variants)
    measured = run["measured"]
    assert {} == measured["errors"]
    if measured["layers"]["observed"]:
        assert_measures_the_same(run, smoke(compared_with()))
    else:
        assert 30 == sum(measured["layers"]["bypassed"].values())
        assert 1 == len(said(run, "30 attention layers bypass glassbox", "KV cache"))
