"""Each family of models: served as without glassbox, and observed rightly, or not observed and said so."""

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from glassbox.export.check_families import CHECK_METRICS
from glassbox.export.families import build_families, samples_per_place
from glassbox.export.prometheus import to_metric
from glassbox.store.merge import merge
from glassbox.store.snapshot import Snapshot
from tests.families.comparison import TOKEN_GAP, VECTOR_GAP, assert_rows_are_there, largest_deviation
from tests.families.family import Family, Task, Truth
from tests.families.models import make_checkpoint
from tests.families.serving import CannotServeError, Observation, Served, serve_observed, serve_plain
from tests.families.softmax_truth import Forward, run_eager
from tests.families.table import FAMILIES
from tools.models_table import COMMAND

pytestmark = [pytest.mark.integration, pytest.mark.families]


def _parameters() -> list[Any]:
    found = []
    for family in FAMILIES:
        marks = [] if family.short else [pytest.mark.slow]
        if family.fault:
            marks.append(pytest.mark.xfail(reason=family.fault, strict=True))
        found.append(pytest.param(family, id=family.name, marks=marks))
    return found


@pytest.mark.parametrize("family", _parameters())
def test_family(family: Family, tmp_path: Path, record: Callable[..., None]) -> None:
    """Every statistic of every layer and head; tokens; and the reason for each layer that isn't observed."""
    import vllm

    checkpoint = tmp_path / "model"
    architecture, model = make_checkpoint(family, checkpoint)
    record(
        family.name,
        architecture=architecture,
        special=family.special,
        fault=family.fault,
        truth=family.truth.value,
        differs=family.differs,
        vllm=vllm.__version__.partition("+")[0],
        date=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        command=COMMAND,
    )
    settings: dict[str, Any] = {"together": family.together, **family.serving}
    if family.unserved:
        with pytest.raises(CannotServeError) as refused:
            serve_plain(checkpoint, **settings)
        record(family.name, unserved=str(refused.value))
        assert family.unserved in str(refused.value)
        return
    plain = serve_plain(checkpoint, **settings)
    served, observation = serve_observed(checkpoint, tmp_path, with_scores=family.truth is Truth.QUERIES, **settings)
    same = all(_is_same(one, other) for one, other in zip(plain, served, strict=True))
    record(family.name, tokens_equal=same, layers=_layers(family))
    assert same, "glassbox changed what is served"
    forwards = []
    if family.truth is Truth.TRANSFORMERS:
        assert model is not None
        forwards = _eager_forwards(model, served)
    _assert_said(family, observation)
    if family.observed:
        for one in served:
            assert_rows_are_there(one)
        deviation = largest_deviation(served, _truths(family, served, forwards))
        record(family.name, deviation=deviation)
        assert deviation <= family.tolerance


def _is_same(one: Served, other: Served) -> bool:
    if one.vectors is None or other.vectors is None:
        return one.tokens == other.tokens
    return torch.equal(one.vectors, other.vectors)


def _layers(family: Family) -> list[dict[str, Any]]:
    return [
        {
            "kind": part.kind.value,
            "layers": list(part.layers),
            "reason": getattr(part.expected, "slug", None),
        }
        for part in family.parts
    ]


def _eager_forwards(model: nn.Module, served: list[Served]) -> list[Forward]:
    """Of transformers, whose own next tokens, or vectors, are those that were served."""
    forwards = [run_eager(model, one.tokens) for one in served]
    for one, forward in zip(served, forwards, strict=True):
        if one.vectors is not None:
            # vLLM gives them a length of 1.
            torch.testing.assert_close(one.vectors, normalize(forward.output, dim=-1), rtol=0, atol=VECTOR_GAP)
            continue
        logits = forward.output[one.prompt_len - 1 : -1]
        chosen = logits.gather(1, torch.tensor(one.tokens[one.prompt_len :])[:, None])[:, 0]
        assert (logits.amax(1) - chosen).max() <= TOKEN_GAP, "vLLM serves another model than transformers runs"
    return forwards


def _truths(family: Family, served: list[Served], forwards: list[Forward]) -> list[Any]:
    """Scores of the observed layers, of each prompt."""
    if family.truth is Truth.TRANSFORMERS:
        found = [forward.layers for forward in forwards]
    else:
        found = [one.scores for one in served]
    assert {len(family.layers)} == {len(layers) for layers in found}
    places = [family.layers.index(layer) for layer in family.observed]
    return [[layers[place] for place in places] for layers in found]


def _assert_said(family: Family, observation: Observation) -> None:
    """Which layers are observed, and why the others aren't, in the log and in what is exported."""
    snapshot = observation.snapshot
    assert snapshot is not None, "nothing is observed, and nothing says so"
    numbers = snapshot.numbers
    assert {} == {stage: count for stage, count in numbers["errors"].items() if count}
    assert len(family.observed) == numbers["layers_observed"]
    assert family.observed == list(snapshot.layers)
    assert family.heads == list(snapshot.layer_heads)
    if family.task is not Task.EMBED:  # without generated tokens some have no value yet
        assert sum(family.heads) * samples_per_place() == _num_samples(snapshot)
    bypassed = {slug: count for slug, count in numbers["layers_bypassed"].items() if count}
    assert {why.slug: count for why, count in family.bypassed.items()} == bypassed
    for why in family.bypassed:
        assert [line for line in observation.log if why.said in line], why.said
    if family.observed:
        assert numbers["canary_rows"]["reproduced"]
        assert not numbers["canary_rows"].get("failed")


def _num_samples(snapshot: Snapshot) -> int:
    """Of the statistics, as Prometheus gets them by layer and head."""
    checks = {metric.name for metric in CHECK_METRICS}
    families = build_families(merge([snapshot]), "head")
    shown = [one for one in families if one.name.startswith("glassbox_attention_") and one.name not in checks]
    return sum(len(to_metric(one).samples) for one in shown)
