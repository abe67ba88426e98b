"""What warm-up hasn't launched is compiled before the first step, whatever vLLM has run: for a GPU that isn't there."""

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import pytest
import torch
import triton

from tests.unit.kernels.absent_gpu import AbsentGpu, absent_gpu

# isort: split
from glassbox.adapter.attention.layer_cache import CacheFinder
from glassbox.config.load import GlassboxConfig
from glassbox.core.errors import ErrorCounter
from glassbox.core.rows import NUM_ROW_COLUMNS, ROW_BATCH, ROW_QUERY, ROW_SLOT
from glassbox.kernels import row_stats
from glassbox.measure.accumulate import Accumulators
from glassbox.measure.contract import BatchTables, DeviceNeeds, MeasuredLayers, StepLayers
from glassbox.measure.deferred import DeferredActions
from glassbox.measure.gpu_measurer import GpuMeasurer
from glassbox.processes.worker.adapters import AdapterSlots
from glassbox.processes.worker.observer import Observer
from glassbox.processes.worker.traces.tracker import RequestTracker
from tests.canaries import QuietCanary
from tests.kernels.nothing_queued import queue_nothing
from tests.trace_samples import make_host

LAYERS: Final = (0, 1, 2)
NAMES: Final = tuple(f"model.layers.{layer}.self_attn.attn" for layer in LAYERS)
MODEL: Final = torch.bfloat16


class VllmLayer(SimpleNamespace):
    """Can be held weakly, as vLLM's can."""


class Impl(SimpleNamespace):
    """Of any backend; writes a cache as FLASH_ATTN does, or one of MLA."""

    def do_kv_cache_update(self, *given: Any) -> None:
        if self.latent:
            latent, rotary, cache, slots, *_ = given
            whole = torch.cat([latent, rotary.flatten(1)], -1)
            cache[slots // cache.shape[1], slots % cache.shape[1]] = whole.to(cache.dtype)
        else:
            _, key, value, cache, slots = given
            for half, numbers in zip(cache.unbind(1), (key, value), strict=True):
                half[slots // half.shape[1], slots % half.shape[1]] = numbers.to(cache.dtype)


def vllm_layer(name: str, cache: torch.Tensor, **more: Any) -> Any:
    """What a layer of vLLM's has, and its impl."""
    impl = Impl(
        latent="kv_lora_rank" in more, scale=0.1, kv_cache_dtype="auto", glassbox_view=None, glassbox_observed=True,
        glassbox_finder=CacheFinder(MODEL), sliding_window=(-1, -1), logits_soft_cap=0, alibi_slopes=None,
        supports_quant_query_input=False, **{"head_size": 128, "num_kv_heads": 1} | more.pop("impl", {}),
    )  # fmt: skip
    one = torch.ones(1)
    return VllmLayer(layer_name=name, impl=impl, kv_cache=cache, _q_scale=one, _k_scale=one, _v_scale=one, **more)


class Worker:
    """Its layers, and what observes them, before vLLM's warm-up.

    Args:
        layer: makes one of a name.
        head_size, kv_heads: of the layers' K.
        compiles: as of AbsentGpu.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        layer: Callable[[str], Any],
        *,
        head_size: int,
        kv_heads: int,
        compiles: bool = False,
    ) -> None:
        queue_nothing(monkeypatch)
        self.gpu: AbsentGpu = absent_gpu(monkeypatch, 90, compiles=compiles)
        self.layers = {name: layer(name) for name in NAMES}
        heads = self.layers[NAMES[0]].num_heads
        self.errors = ErrorCounter(logging.getLogger("test"))
        deferred = DeferredActions(self.errors)
        measured = MeasuredLayers(
            Accumulators(len(LAYERS), heads, "cpu"), {name: local for local, name in enumerate(NAMES)}, 4, 16
        )
        self.measurer = GpuMeasurer(
            measured, DeviceNeeds(8, head_size, kv_heads, MODEL, deferred, lambda: False), self.errors
        )
        self.canary = QuietCanary(LAYERS)
        self.observer = Observer(
            self.measurer, layers=LAYERS, layer_names=NAMES, layer_heads=(heads,) * len(LAYERS),
            config=GlassboxConfig().model_copy, requests=RequestTracker(make_host(layers=LAYERS), deferred),
            canary=self.canary, adapters=AdapterSlots(0), listen=lambda _: None, errors=self.errors,
        )  # fmt: skip
        self.tables = BatchTables(
            torch.zeros(2, 19, dtype=torch.int32), torch.tensor([0, 1, 40], dtype=torch.int32),
            torch.tensor([37, 70], dtype=torch.int32), object(),
        )  # fmt: skip

    def step(self, attend: Callable[[Any], None]) -> None:
        """One that measures a row of each of two requests, one that decodes and one with a prompt."""
        rows = np.zeros((2, NUM_ROW_COLUMNS), dtype=np.int32)
        rows[:, ROW_BATCH], rows[:, ROW_QUERY], rows[:, ROW_SLOT] = (0, 1), (0, 7), -1
        self.measurer.begin(rows, StepLayers(frozenset(LAYERS), frozenset(LAYERS)), None, None)
        for name, layer in self.layers.items():
            self.measurer.on_build([name], self.tables)
            attend(layer)
        self.measurer.finish()

    def plain(self, layer: Any) -> None:
        """Queries of a whole batch, rotated in place or in tensors of their own; K and V of it."""
        heads = layer.num_heads
        sizes = [heads * 128, 2 * 128, 2 * 128]
        query, key, value = torch.zeros(40, sum(sizes), dtype=MODEL).split(sizes, -1)
        if layer.query_quant is not None:
            query = query.to(torch.float8_e4m3fn)
        for queries in (query, query.contiguous()):
            self.observer.after_attention(
                layer.impl, layer, queries.view(40, heads, 128), key.view(40, 2, 128), value.view(40, 2, 128),
                layer.kv_cache, self.tables, torch.zeros(40, heads * 128, dtype=MODEL),
            )  # fmt: skip

    def latent(self, layer: Any) -> None:
        """The first token's queries absorbed, with head after head, and a prompt's."""
        prompt = torch.zeros(40, layer.num_heads, 192, dtype=MODEL)[1:]  # behind the first token
        self.observer.after_latent_attention(layer.impl, layer, layer.kv_cache, *self.absorbed(layer), prompt)

    def absorbed(self, layer: Any) -> tuple[Any, torch.Tensor]:
        """Of one token, and what it is answered."""
        heads = layer.num_heads
        parts = (
            torch.zeros(heads, 1, 512, dtype=MODEL).transpose(0, 1),
            torch.zeros(1, heads, 192, dtype=MODEL)[..., 128:],
        )
        output = torch.zeros(1, heads, 512, dtype=MODEL)
        if layer.impl.supports_quant_query_input:
            return torch.cat(parts, -1).to(torch.float8_e4m3fn), output
        return parts, output


def plain_layer(name: str) -> Any:
    return vllm_layer(
        name, torch.zeros(4, 2, 16, 2, 128, dtype=MODEL), num_heads=8, head_size=128, head_size_v=128, query_quant=None,
        impl={"num_kv_heads": 2},
    )  # fmt: skip


def quantised_layer(name: str) -> Any:
    layer = plain_layer(name)
    layer.kv_cache, layer.query_quant = quantised(layer.kv_cache), object()
    layer.impl.kv_cache_dtype = "fp8"
    return layer


def latent_layer(name: str) -> Any:
    return vllm_layer(
        name, torch.zeros(4, 64, 576, dtype=MODEL), num_heads=16, kv_lora_rank=512, qk_nope_head_dim=128,
        qk_rope_head_dim=64, head_size=576, W_UK_T=torch.zeros(16, 128, 512, dtype=MODEL),
    )  # fmt: skip


def quantised_latent_layer(name: str) -> Any:
    layer = latent_layer(name)
    layer.kv_cache = quantised(layer.kv_cache)
    layer.impl.kv_cache_dtype, layer.impl.supports_quant_query_input = "fp8", True
    return layer


def quantised(cache: torch.Tensor) -> torch.Tensor:
    """In FP8."""
    return torch.zeros(cache.shape, dtype=torch.uint8).view(torch.float8_e4m3fn)


@pytest.fixture
def latent(monkeypatch: pytest.MonkeyPatch) -> Worker:
    return Worker(monkeypatch, latent_layer, head_size=576, kv_heads=1)


def asked_in_a_step(worker: Worker, attend: Callable[[Any], None]) -> list[str]:
    """Kernels whose programs are made in the first step."""
    known = len(worker.gpu.asked)
    worker.step(attend)
    assert not any(count for stage, count in worker.errors.counts().items() if stage != "graph_nodes")
    return worker.gpu.asked[known:]


def test_no_attention_in_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with --enforce-eager; every kernel once, not once a layer. They are compiled, and vLLM, whose own warm-up is
    over, isn't told: with --jit-monitor-mode error it would fail them."""

    def fail(**_: object) -> None:
        raise RuntimeError("Triton kernel JIT compilation during inference")

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", fail)
    worker = Worker(monkeypatch, plain_layer, head_size=128, kv_heads=2, compiles=True)
    worker.observer.arm(worker.layers)
    assert fail is triton.knobs.runtime.jit_post_compile_hook
    assert frozenset(LAYERS) == worker.canary.allowed
    assert worker.gpu.asked == [one.kernel for one in worker.gpu.compiled]
    # The statistics of a layer by itself, and of few rows in all layers.
    assert 2 == worker.gpu.asked.count("_row_stats_kernel")
    for kernel in ("_row_keep_kernel", "_row_output_kernel", "_row_probe_kernel"):
        assert 1 == worker.gpu.asked.count(kernel)
    assert {"_prompt_rows_kernel", "_received_kernel", "_span_mass_kernel"} <= set(worker.gpu.asked)
    assert [] == asked_in_a_step(worker, worker.plain)
    assert not worker.measurer._accumulators.rows.any(), "the GPU that isn't there has measured nothing"


def test_no_latent_attention_in_warm_up(latent: Worker) -> None:
    """Both launches of a step."""
    latent.observer.arm(latent.layers)
    assert 2 == latent.gpu.asked.count("_row_stats_kernel")
    assert [] == asked_in_a_step(latent, latent.latent)


def test_no_prompt_of_latent_attention_in_warm_up(latent: Worker) -> None:
    """As where graphs are captured of decode steps; what has run is not launched again."""
    for name, layer in latent.layers.items():
        latent.measurer.on_build([name], latent.tables)
        latent.observer.after_latent_attention(layer.impl, layer, layer.kv_cache, *latent.absorbed(layer), None)
    assert ["_row_stats_kernel"] == latent.gpu.asked
    latent.observer.arm(latent.layers)
    assert 2 == latent.gpu.asked.count("_row_stats_kernel")
    assert [] == asked_in_a_step(latent, latent.latent)


def test_quantised_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8, as vLLM makes them where the backend takes them."""
    worker = Worker(monkeypatch, quantised_layer, head_size=128, kv_heads=2)
    worker.observer.arm(worker.layers)
    assert 1 == worker.gpu.asked.count("_row_stats_kernel")
    assert [] == asked_in_a_step(worker, worker.plain)


def test_quantised_queries_of_latent_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that vLLM absorbs; a prompt's are not."""
    worker = Worker(monkeypatch, quantised_latent_layer, head_size=576, kv_heads=1)
    worker.observer.arm(worker.layers)
    assert 2 == worker.gpu.asked.count("_row_stats_kernel")
    assert [] == asked_in_a_step(worker, worker.latent)


def test_a_layer_that_cannot_be_rehearsed(latent: Worker) -> None:
    """It is counted, and is observed all the same; the others are rehearsed."""
    del latent.layers[NAMES[0]].qk_nope_head_dim
    latent.observer.arm(latent.layers)
    assert 2 == latent.gpu.asked.count("_row_stats_kernel")
    assert 2 == latent.errors.counts()["observe"]
    assert frozenset(LAYERS) == latent.canary.allowed


def test_what_fails_to_compile_is_not_observed(latent: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its other kernel was compiled."""

    def constants(*args: Any, by_row: bool, **more: Any) -> Any:
        if not by_row:
            raise RuntimeError("ptxas is out of order")
        return make(*args, by_row=by_row, **more)

    make = row_stats._constants
    monkeypatch.setattr(row_stats, "_constants", constants)
    latent.observer.arm(latent.layers)
    assert frozenset() == latent.canary.allowed
