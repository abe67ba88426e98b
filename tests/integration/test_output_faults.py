"""vLLM in process, and glassbox that misreads it, or an attention kernel that is broken: each is found and named.

The features that the model lacks are given to three of its layers, of which vLLM's kernel then computes with a window,
a soft cap or learned sinks. Every step is checked.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from safetensors import safe_open

from glassbox.adapter.runner import Batch
from glassbox.core.output_checks import LayerState
from glassbox.processes.worker import observer as observer_module
from tests.attached import plugin
from tests.integration.checked_engine import HEADS, LAYERS, CheckedEngine

pytestmark = pytest.mark.integration

WINDOWED, CAPPED, SUNK, FAULTY, HEAD = 5, 6, 7, 11, 4


@pytest.fixture(scope="module")
def plugin_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("glassbox")
    with plugin(folder, "sample_rate: 1.0\nexport: {interval_s: 60}\n"):
        yield


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def engine(request: pytest.FixtureRequest, demo_model_path: Path, plugin_environment: None) -> CheckedEngine:
    return CheckedEngine(demo_model_path, request.param)


@pytest.fixture(scope="module")
def text(demo_model_path: Path) -> list[int]:
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(demo_model_path).encode(
        "The attention of a language model decides which earlier words each new word is made from. "
        "Operators of a server seldom see it, although a broken template or a wrong rotary base shows there first. "
        "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n"
        "Once upon a time there was a small robot who lived in a lighthouse and counted the ships that passed. "
    )
    return ids


@pytest.fixture
def prompts(text: list[int]) -> list[list[int]]:
    """Of different lengths, the first in several chunks."""
    return [text[:90], text[20:61], text[45:52]]


def in_vllm(engine: CheckedEngine, layer: int, **attributes: Any) -> AbstractContextManager[None]:
    """A layer of vLLM's with another attribute of its impl; views that are made from now on know of it."""

    @contextmanager
    def changed() -> Iterator[None]:
        impl = engine.attention(layer).impl
        before = {name: getattr(impl, name) for name in attributes}
        vars(impl).update(attributes)
        try:
            yield
        finally:
            vars(impl).update(before)

    return changed()


@pytest.fixture
def featured(engine: CheckedEngine) -> Iterator[CheckedEngine]:
    """Three layers have a window, a soft cap and learned sinks."""
    with (
        in_vllm(engine, WINDOWED, sliding_window=20),
        in_vllm(engine, CAPPED, logits_soft_cap=10.0),
        in_vllm(engine, SUNK, sinks=torch.linspace(2.0, 6.0, HEADS)),
    ):
        yield engine


def test_everything_is_reproduced(
    featured: CheckedEngine, text: list[int], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some hundred rows of each layer: chunked prefill, prefix caching, preemption, windows, caps and sinks."""
    scheduler: Any = featured.llm.llm_engine.engine_core.engine_core.scheduler
    preempted = []
    preempt = scheduler._preempt_request

    def noting(request: Any, *args: Any, **kw: Any) -> Any:
        preempted.append(request)
        return preempt(request, *args, **kw)

    monkeypatch.setattr(scheduler, "_preempt_request", noting)
    many = [text[n : n + 70 + 5 * n] for n in range(8)]

    def serve() -> list[list[int]]:
        return [
            *featured.serve(many, 45),
            *featured.serve([many[7] + many[0][:5], many[6]], 8, keep_prefixes=True),
        ]

    found = featured.watch(serve, caplog)
    assert ([], [], {}, {}) == (found.said, found.failed, found.bypassed, found.errors)
    assert [LayerState.CERTIFIED] * LAYERS == featured.worker._canary.checks().state.tolist()
    assert 0 == found.counts["failed"]
    assert 300 * LAYERS < found.counts["reproduced"]
    assert (found.rows[1] > 0).all()
    assert preempted


@contextmanager
def patched(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, make(getattr(owner, name)))
        yield


def misread_view(engine: CheckedEngine, layer: int, change: Callable[[Any], None]) -> AbstractContextManager[None]:
    """glassbox's view of one layer is wrong from the moment on that it is made."""

    def wrong(view_of: Any) -> Any:
        def made(impl: Any, *args: Any) -> Any:
            is_new = impl.glassbox_view is None
            view = view_of(impl, *args)
            if is_new and view.is_of(engine.attention(layer)):
                change(view)
            return view

        return made

    return patched(observer_module, "view_of", wrong)


def misread_params(engine: CheckedEngine, layer: int, **params: Any) -> AbstractContextManager[None]:
    def change(view: Any) -> None:
        view.params = replace(view.params, **{name: new(view.params) for name, new in params.items()})

    return misread_view(engine, layer, change)


def another_slot(engine: CheckedEngine, which: str) -> AbstractContextManager[None]:
    """Of K or V each slot is taken for the one before it."""

    def change(view: Any) -> None:
        layout = view.layout(view.layer.kv_cache)
        places = getattr(layout, which)
        shifted = replace(places, offsets=places.offsets.roll(-1, 0))
        view._layout = replace(layout, **{which: shifted})

    return misread_view(engine, FAULTY, change)


def another_table(_: CheckedEngine) -> AbstractContextManager[None]:
    """Each request is taken for the next one."""

    def wrong(tables_of: Any) -> Any:
        def tables(metadata: Any) -> Any:
            found = tables_of(metadata)
            return found._replace(block_table=found.block_table.roll(1, 0))

        return tables

    return patched(observer_module, "tables_of", wrong)


def louder_head(engine: CheckedEngine) -> AbstractContextManager[None]:
    """vLLM's kernel gives one head's output 2 % too large in one layer."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    name = engine.attention(FAULTY).layer_name

    def wrong(forward: Any) -> Any:
        def forwarded(impl: Any, layer: Any, *args: Any, **kw: Any) -> Any:
            output = forward(impl, layer, *args, **kw)
            if layer.layer_name == name:
                output.view(len(output), HEADS, -1)[:, HEAD] *= 1.02
            return output

        return forwarded

    return patched(CPUAttentionBackendImpl, "forward", wrong)


@dataclass(frozen=True)
class Fault:
    """Something wrong, in vLLM or in how glassbox reads it.

    Attributes:
        make: a context in which it is.
        layer: that must fail; None is all.
        said: of it, a pattern.
    """

    make: Callable[[CheckedEngine], AbstractContextManager[None]]
    said: str
    layer: int | None = FAULTY


ROUNDING = r"(row|mean) error [\d.e+]+ times what rounding in (float32|bfloat16)"
FAULTS: Final[dict[str, Fault]] = {
    "keys one slot off": Fault(lambda e: another_slot(e, "key"), ROUNDING),
    "values one slot off": Fault(lambda e: another_slot(e, "value"), ROUNDING),
    "another request's block table": Fault(another_table, ROUNDING, layer=None),
    "a window too many": Fault(lambda e: misread_params(e, FAULTY, sliding_window=lambda _: 32), ROUNDING),
    "scale 1 % too large": Fault(
        lambda e: misread_params(e, FAULTY, scale=lambda p: 1.01 * p.scale), r"scores are 0\.9[89]\d times what queries"
    ),
    "a window left out": Fault(
        lambda e: misread_params(e, WINDOWED, sliding_window=lambda _: None), ROUNDING, WINDOWED
    ),
    "a soft cap left out": Fault(lambda e: misread_params(e, CAPPED, soft_cap=lambda _: None), "times what", CAPPED),
    "sinks left out": Fault(lambda e: misread_params(e, SUNK, sinks=lambda _: None), "times what", SUNK),
    "a head 2 % too large": Fault(louder_head, rf"head {HEAD}'s output is 1\.0[12]\d times what its keys and values"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_found_and_named(
    featured: CheckedEngine, prompts: list[list[int]], caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """The log says where and what, rows are counted, the layer is not shown any more, and vLLM isn't disturbed."""
    fault = FAULTS[name]
    with fault.make(featured):
        with featured.unobserved():
            expected = featured.serve(prompts, 4)
        found = featured.watch(lambda: featured.serve(prompts, 4), caplog)
    failed = list(range(LAYERS)) if fault.layer is None else [fault.layer]
    assert failed == found.failed
    assert {"not_reproduced": len(failed)} == found.bypassed
    assert found.counts["failed"] >= len(failed)
    assert not found.rows[1][failed].any()
    assert (np.delete(found.rows[1], failed) > 0).all()
    assert expected == found.tokens
    assert {} == found.errors
    said = found.said[0]
    layer = r"\d+" if fault.layer is None else fault.layer
    assert re.search(rf"output of layer {layer} \(model\.layers\.{layer}\.self_attn\.attn\) is not what", said)
    assert re.search(fault.said, said)
    if fault.layer is None:
        assert "as are 29 others" in said


def test_probation(engine: CheckedEngine, prompts: list[list[int]], caplog: pytest.LogCaptureFixture) -> None:
    """On a vLLM that nobody tested: what was reproduced is observed from then on, the rest never is."""
    with FAULTS["keys one slot off"].make(engine):
        found = engine.watch(lambda: engine.serve(prompts, 4), caplog, probation=True)
    assert [FAULTY] == found.failed
    assert {"not_reproduced": 1} == found.bypassed
    assert not (found.rows[0] + found.rows[1])[FAULTY]
    assert (np.delete(found.rows[1], FAULTY) > 0).all()
    assert "is not among the tested ones; 29 of 30 layers reproduced, the others are not observed" in found.said[1]


def test_rows_in_another_order(
    engine: CheckedEngine, prompts: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    """What the runner says of its batch is not what its metadata says: such a step is not measured at all."""

    def wrong(read_batch: Any) -> Any:
        def read(*args: Any) -> Batch:
            batch = read_batch(*args)
            order = np.roll(np.arange(len(batch.req_ids)), 1)
            return replace(
                batch,
                num_computed=batch.num_computed[order],
                prompt_len=batch.prompt_len[order],
                req_ids=tuple(batch.req_ids[n] for n in order),
            )

        return read

    with engine.unobserved():
        expected = engine.serve(prompts, 4)
    with patched(observer_module, "read_batch", wrong):
        found = engine.watch(lambda: engine.serve(prompts, 4), caplog)
    assert {"batch"} == found.errors.keys()
    assert found.errors["batch"] >= 4
    assert ([], 0) == (found.failed, found.counts["failed"])
    assert expected == found.tokens
    assert "batch failed: BatchMismatchError" in found.said[0]


@contextmanager
def flipped_bit(engine: CheckedEngine, model: Path, bit: int) -> Iterator[None]:
    """As if one bit of one weight behind a layer's attention, in bfloat16, were another.

    vLLM keeps no plain weights on a CPU: what the bit makes of the projection is added to what it gives.
    """
    projection, row, column = engine.decoder(FAULTY).self_attn.o_proj, 10, 100
    with safe_open(model / "model.safetensors", "pt") as weights:
        weight = weights.get_tensor(f"model.layers.{FAULTY}.self_attn.o_proj.weight")[row, column].clone()
    flipped = (weight.view(torch.int16) ^ (1 << bit)).view(torch.bfloat16)

    def add(_: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        of_row = outputs[0][:, row]
        of_row.copy_(of_row.float() + (flipped.float() - weight.float()) * inputs[0][:, column].float())

    handle = projection.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
        for layer in range(LAYERS):  # vLLM's kernel reads slots that no key was written to, times 0
            engine.attention(layer).kv_cache.zero_()


@pytest.mark.parametrize("bit", [9, 14], ids=["16 times", "2^128 times"])
def test_a_flipped_bit_in_a_weight(
    engine: CheckedEngine,
    demo_model_path: Path,
    prompts: list[list[int]],
    caplog: pytest.LogCaptureFixture,
    bit: int,
) -> None:
    """Answers change, but each layer attends to what it was given: the canary says nothing."""
    healthy = engine.serve(prompts, 8)
    with flipped_bit(engine, demo_model_path, bit):
        found = engine.watch(lambda: engine.serve(prompts, 8), caplog)
        states = engine.worker._canary.checks().state
    assert bit == 9 or healthy != found.tokens
    assert ([], [], 0, {}) == (found.said, found.failed, found.counts["failed"], found.errors)
    assert (states[: FAULTY + 1] == LayerState.CERTIFIED).all()
