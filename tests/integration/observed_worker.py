"""A worker's observer over a real measurer and real caches, driven step by step without vLLM's engine."""

import logging
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch

from glassbox.adapter.attention.layer_cache import CacheFinder
from glassbox.adapter.scheduler import ScheduledStep
from glassbox.config.load import GlassboxConfig
from glassbox.core.errors import ErrorCounter
from glassbox.measure.accumulate import Accumulators
from glassbox.measure.contract import DeviceNeeds, MeasuredLayers
from glassbox.measure.deferred import DeferredActions
from glassbox.measure.for_device import make_measurer
from glassbox.processes.worker.adapters import AdapterSlots
from glassbox.processes.worker.observer import Observer
from glassbox.processes.worker.traces.tracker import RequestTracker
from tests.canaries import QuietCanary
from tests.trace_samples import Scheduled, make_host, new_request

LAYERS: Final = (0, 4, 8)
NAMES: Final = tuple(f"model.layers.{layer}.self_attn.attn" for layer in LAYERS)
HEADS, KV_HEADS, D, BLOCK = 4, 2, 64, 32
# Keys of each of three requests before the first step; each step adds one. The first asks for everything.
KEYS: Final = (69, 39, 2)
PROMPTS: Final = (30, 20, 1)
IDS: Final = ("a-00000000", "b-00000000", "c-00000000")
EVERYTHING: Final = {"glassbox": "trace", "glassbox_top_k": 3, "glassbox_spans": ["head=0:4"], "glassbox_rows": 1}


class VllmLayer(SimpleNamespace):
    """Can be held weakly, as vLLM's can."""


class GpuImpl(SimpleNamespace):
    """Writes a cache as vLLM's GPU backends do."""

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        for part, numbers in zip(cache.transpose(1, 2).split(D, dim=-1), (key, value), strict=True):
            part[slots // BLOCK, slots % BLOCK] = numbers


def gpu_layer(name: str, cache: torch.Tensor) -> Any:
    """A layer as vLLM's GPU backends have it."""
    impl = GpuImpl(
        scale=0.2, head_size=D, num_kv_heads=KV_HEADS, sliding_window=-1, logits_soft_cap=0, alibi_slopes=None,
        kv_cache_dtype="auto", glassbox_view=None, glassbox_finder=None,
    )  # fmt: skip
    one = torch.ones(1, device=cache.device)
    return VllmLayer(
        layer_name=name, impl=impl, kv_cache=cache, head_size=D, head_size_v=D, _q_scale=one, _k_scale=one,
        _v_scale=one, _k_scale_float=1.0, _v_scale_float=1.0,
    )  # fmt: skip


class ObservedWorker:
    """Decode steps of three requests in three layers; the keys are all written beforehand.

    Args:
        device: cpu or cuda.
        native: whether the CPU's native kernel may be used.

    Attributes:
        listening: what `listen` was told.
    """

    def __init__(self, device: str, *, native: bool = True) -> None:
        generator = torch.Generator().manual_seed(3)
        self.device, self.steps = device, 0
        self.errors = ErrorCounter(logging.getLogger("glassbox.tests"))
        self.deferred = DeferredActions(self.errors)
        self.accumulators = Accumulators(len(LAYERS), HEADS, device)
        self.measurer = make_measurer(
            MeasuredLayers(self.accumulators, {name: local for local, name in enumerate(NAMES)}, 4, 8),
            DeviceNeeds(16, D, KV_HEADS, torch.float32, self.deferred, is_piecewise=lambda: False),
            self.errors,
        )
        if not native:
            self.measurer._native, self.measurer._sums = False, None  # type: ignore[attr-defined]
        self.listening: list[bool] = []
        self.requests = RequestTracker(make_host(layers=LAYERS, num_heads=HEADS), self.deferred)
        self.observer = Observer(
            self.measurer,
            layers=LAYERS,
            layer_names=NAMES,
            layer_heads=(HEADS,) * len(LAYERS),
            config=GlassboxConfig.model_validate({"sample_rate": 1.0}).model_copy,
            requests=self.requests,
            canary=QuietCanary(LAYERS),
            adapters=AdapterSlots(0),
            listen=self.listening.append,
            errors=self.errors,
        )
        self.table = torch.tensor([[5, 1, 7], [0, 3, 4], [2, 6, 6]], dtype=torch.int32, device=device)
        self.query = torch.randn(len(KEYS), HEADS, D, generator=generator).to(device)
        self.layers = [self._layer(name, generator) for name in NAMES]
        # Kernels are compiled here, and graphs would be captured.
        self._forward(self._metadata())
        self.observer.arm({})

    def _layer(self, name: str, generator: torch.Generator) -> tuple[Any, Any, torch.Tensor]:
        """Impl, layer and cache, whose every block holds keys."""
        cache = torch.zeros(8, KV_HEADS, BLOCK, 2 * D)
        keys = torch.randn(8 * BLOCK, KV_HEADS, D, generator=generator)
        if self.device == "cpu":
            from vllm import _custom_ops as ops

            key_half, value_half = cache.view(8, KV_HEADS, 2 * BLOCK, D).chunk(2, dim=2)
            slots = torch.arange(8 * BLOCK)
            ops.cpu_attn_reshape_and_cache(
                keys, torch.zeros_like(keys), key_half, value_half, slots, "vec", 1.0, 1.0, "auto"
            )
        else:
            cache[..., :D] = keys.view(8, BLOCK, KV_HEADS, D).transpose(1, 2)
            cache = cache.to(self.device)
        if self.device == "cpu":
            from tests.integration.cpu_layer import cpu_layer, layout_of

            of_vllm = cpu_layer(cache, num_kv_heads=KV_HEADS, head_size=D, name=name)
            layout_of(of_vllm, torch.float32)
            return of_vllm.impl, of_vllm, cache
        layer = gpu_layer(name, cache)
        layer.impl.glassbox_finder = CacheFinder(torch.float32)
        return layer.impl, layer, cache

    def _metadata(self) -> Any:
        starts = torch.arange(len(KEYS) + 1, dtype=torch.int32)
        lens = torch.tensor([n + 1 + self.steps for n in KEYS], dtype=torch.int32)
        common = {"query_start_loc": starts.to(self.device), "seq_lens": lens.to(self.device)}
        return SimpleNamespace(
            **common,
            query_start_loc_cpu=starts,
            block_table_tensor=self.table,
            causal=True,
            mm_req_doc_ranges=None,
            block_table=self.table,
        )

    def _forward(self, metadata: Any) -> None:
        self.observer.on_build(list(NAMES), metadata)
        for impl, layer, cache in self.layers:
            if self.listening[-1]:
                self.observer.after_attention(impl, layer, self.query, None, None, cache, metadata, None)

    def step(self) -> None:
        """One decode step."""
        batch = SimpleNamespace(
            num_reqs=len(KEYS),
            num_computed_tokens_cpu=np.array(KEYS) + self.steps,
            num_prompt_tokens=np.array(PROMPTS),
            req_ids=list(IDS),
        )
        new = [] if self.steps else [new_request(IDS[0], PROMPTS[0], EVERYTHING)]
        output = Scheduled(scheduled_new_reqs=new, num_scheduled_tokens=dict.fromkeys(IDS, 1))
        runner: Any = SimpleNamespace(input_batch=batch, requests={})
        self.observer.start_step(runner, ScheduledStep(output))
        try:
            self._forward(self._metadata())
        finally:
            self.observer.stop_step()
        self.steps += 1

    def rows(self) -> list[int]:
        """Rows measured so far, in each layer; they must be the same in all heads."""
        self.deferred.finish()
        rows = self.measurer.copy(1.0).rows.sum(-1)
        assert (rows == rows[:, :1]).all()
        return [int(n) for n in rows[:, 0]]

    def traced_positions(self) -> list[int]:
        """Of the rows that the trace keeps."""
        (trace,) = self.requests.active()
        return [int(position) for position in trace.record().positions]
