"""Prompts of which all rows are measured, on a GPU: what is launched after a layer's attention, and how it comes back.

Owns the launches of one step and the thread that copies their answers, which are too many for the thread of the steps:
a prompt of 8,192 tokens in 32 layers of 32 heads is 335 MB of statistics. Layers are measured where Python runs after
their attention, that is in eager and in piecewise steps; vLLM replays whole graphs for batches of decode tokens alone,
unless it is told to (`cudagraph_mode: FULL`). What a step has not measured is counted, and named in the log.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from glassbox.core.errors import ErrorCounter
from glassbox.core.logs import get_logger, log_once
from glassbox.core.statistics import NUM_STATISTICS
from glassbox.kernels.key_grams import gram, keys_at, sequence_keys
from glassbox.kernels.layer_params import LayerParams
from glassbox.kernels.paged_keys import MAX_HEAD_SIZE
from glassbox.kernels.probe_answers import PromptAnswers, kv_heads
from glassbox.kernels.prompt_rows import PromptChunk, prompt_rows
from glassbox.measure.contract import AskedPrompt, BatchTables, Forward, LatentForward, StepTraces, StridedLayer
from glassbox.measure.latent_prompts import absorbed_queries, latent_bytes, latent_prompt_rows
from glassbox.measure.prompt_memory import FreeBytes, PromptMemory, UnmeasuredPromptError, free_bytes, out_of_memory

logger = get_logger(__name__)


@dataclass(frozen=True, eq=False)
class Found:
    """What was found of a prompt in one layer.

    Attributes:
        number: of the prompt in its step; local_layer: which.
        answers: on the device.
    """

    number: int
    local_layer: int
    answers: PromptAnswers[Tensor]


class Copied:
    """Answers on their way to the host; see `deferred.Awaited`.

    Args:
        future: of the copies.
    """

    def __init__(self, future: "Future[None]") -> None:
        self._future = future

    def query(self) -> bool:
        """Whether all are kept."""
        return self._future.done()

    def synchronize(self) -> None:
        """Wait until they are."""
        self._future.exception()


class GpuPrompts:
    """The prompts of a step.

    Args:
        device: of the layers.
        sink_tokens, local_window: in tokens, see core/statistics.py.
        errors: counts what is not measured, as stage `prompt`.
        activation_bytes, ask: as `PromptMemory` takes them; None asks the device.
    """

    def __init__(
        self,
        device: torch.device,
        sink_tokens: int,
        local_window: int,
        errors: ErrorCounter,
        *,
        activation_bytes: int = 0,
        ask: Callable[[], FreeBytes] | None = None,
    ) -> None:
        self._device = device
        self._memory = PromptMemory(activation_bytes, ask or partial(free_bytes, device))
        self._sink_tokens, self._local_window, self._errors = sink_tokens, local_window, errors
        self._asked: Sequence[AskedPrompt] = ()
        self._heads: dict[tuple[int, ...], Tensor] = {}
        self._spans: dict[int, Tensor] = {}
        self._found: list[Found] = []
        self._failed: set[int] = set()
        self._found_bytes = 0
        self._compiled: set[object] = set()
        # Of answers that wait on the device, and what guards it.
        self._waiting_bytes, self._lock = 0, threading.Lock()
        # For the copies; made when there is something to copy.
        self._pool: ThreadPoolExecutor | None = None
        self._stream: torch.cuda.Stream | None = None

    def end_warm_up(self) -> None:
        """vLLM has captured its graphs."""
        self._memory.end_warm_up()

    def begin(self, asked: Sequence[AskedPrompt]) -> None:
        """A step begins that has these."""
        self._asked, self._found, self._found_bytes, self._spans, self._failed = asked, [], 0, {}, set()
        self._memory.begin()
        if len(self._heads) > 64:
            self._heads = {}

    def wants(self, local: int) -> bool:
        """Whether one of the step's prompts is measured in this layer."""
        return any(local in asked.local_layers for asked in self._asked)

    def compile(self, layer: StridedLayer, forward: Forward | LatentForward, kv_cache: Tensor) -> None:
        """In warm-up: measure one row of whatever is there, so that no served step waits for a compiler."""
        latent = forward if isinstance(forward, LatentForward) else None
        query = forward.plain if isinstance(forward, LatentForward) else forward.query
        if query is None or query.shape[2] > MAX_HEAD_SIZE:
            return
        params, keys = layer.params, layer.keys(kv_cache)
        of_params = (params.soft_cap, params.alibi_slopes, params.sinks, params.q_scale, params.k_scale)
        kind = (
            query.dtype, query.stride(), layer.num_heads, keys.dtype, keys.shape[1:], keys.stride(),
            *(one is None for one in of_params),
        )  # fmt: skip
        if kind in self._compiled:
            return
        self._compiled.add(kind)
        first = torch.zeros(1, dtype=torch.int32, device=keys.device)  # head, and block
        measure = prompt_rows if latent is None else partial(latent_prompt_rows, latent)
        for squares in (False, True):
            measure(
                query,
                keys,
                first,
                PromptChunk(0, 1, 0),
                params,
                first,
                spans=first.new_zeros(1, 2),
                span_range=(0, 1),
                squares=squares,
            )

    def measure(
        self,
        local: int,
        layer: StridedLayer,
        forward: Forward | LatentForward,
        kv_cache: Tensor,
        tables: BatchTables,
    ) -> None:
        """Queue what the step's prompts ask of a layer whose attention was queued just now."""
        for number, asked in enumerate(self._asked):
            if local in asked.local_layers:
                if isinstance(forward, LatentForward):
                    token = asked.token - forward.num_absorbed
                    self._queue(number, local, layer, forward.plain, token, kv_cache, tables, forward)
                else:
                    self._queue(number, local, layer, forward.query, asked.token, kv_cache, tables)

    def measure_kept(self, number: int, local: int, layer: StridedLayer, queries: Tensor, tables: BatchTables) -> None:
        """Queue what a prompt asks of a layer in which a CUDA graph has kept its queries, [N, H, D]."""
        is_wide = layer.head_size > MAX_HEAD_SIZE  # absorbed ones
        self._queue(number, local, layer, None if is_wide else queries, 0, None, tables)

    def missing(self) -> list[tuple[int, AskedPrompt, list[int]]]:
        """Number, question and layers of what was asked, and neither measured nor tried so far."""
        measured = {(one.number, one.local_layer) for one in self._found}
        left = [
            (number, asked, sorted(n for n in asked.local_layers if (number, n) not in measured))
            for number, asked in enumerate(self._asked)
            if number not in self._failed
        ]
        return [one for one in left if one[2]]

    def collect(self, traced: StepTraces, done: torch.cuda.Event) -> Copied:
        """Begin to copy what was found in this step, on another thread, and count what is missing.

        Args:
            traced: is given the answers; it is not committed.
            done: when the device has come so far.
        """
        found, nbytes = self._found, self._found_bytes
        self._count_missing()
        self.begin(())
        with self._lock:
            self._waiting_bytes += nbytes
        if self._pool is None:
            # See GpuMeasurer.enter_thread.
            self._pool = ThreadPoolExecutor(1, "glassbox-prompts", torch.cuda.set_device, (self._device,))
            self._stream = torch.cuda.Stream(self._device)
        return Copied(self._pool.submit(self._copy, found, nbytes, traced, done))

    def _copy(self, found: list[Found], nbytes: int, traced: StepTraces, done: torch.cuda.Event) -> None:
        try:
            with self._errors.guard("prompt"), torch.inference_mode():
                done.synchronize()
                with torch.cuda.stream(self._stream):
                    while found:
                        one = found.pop(0)
                        # Into pageable memory: it is there when the call returns, and only this thread waits for it.
                        traced.add_prompt(one.number, one.local_layer, one.answers.moved(_to_numpy))
                traced.assemble_prompts()
        finally:
            with self._lock:
                self._waiting_bytes -= nbytes

    def _queue(
        self,
        number: int,
        local: int,
        layer: StridedLayer,
        query: Tensor | None,
        token: int,
        kv_cache: Tensor | None,
        tables: BatchTables,
        latent: LatentForward | None = None,
    ) -> None:
        """One that fails is not tried in other layers of the step."""
        if number in self._failed:
            return
        try:
            if query is None or token < 0:
                raise UnmeasuredPromptError(
                    "whole prompts of latent attention (MLA) are not measured on a GPU in chunks that vLLM computes as "
                    "it decodes: of 1 token, with FLASHMLA of up to 128, with FLASH_ATTN_MLA of up to 512. Use "
                    "--attention-backend TRITON_MLA, or leave out glassbox_prompt"
                )
            asked, keys = self._asked[number], layer.keys(kv_cache)
            queries = query[token : token + asked.num_rows]
            needed = _needed_bytes(asked, layer.num_heads, queries, keys, latent=latent is not None)
            left = self._memory.left(needed, found=self._found_bytes, waiting=self._waiting_bytes)
            try:
                answers = self._answers(asked, number, layer, queries, keys, tables, latent, left)
            except torch.OutOfMemoryError as error:
                raise out_of_memory(needed, error) from error
        except Exception as error:
            self._failed.add(number)
            self._errors.count("prompt", error)
        else:
            self._found.append(Found(number, local, answers))
            self._found_bytes += _nbytes(answers)
            self._memory.held(self._waiting_bytes + self._found_bytes)

    def _answers(
        self,
        asked: AskedPrompt,
        number: int,
        layer: StridedLayer,
        queries: Tensor,
        keys: Tensor,
        tables: BatchTables,
        latent: LatentForward | None,
        left: int,
    ) -> PromptAnswers[Tensor]:
        table, device = tables.block_table[asked.batch], queries.device
        chosen = tuple(head for head in asked.heads if head < layer.num_heads)
        group = layer.num_heads // keys.shape[1]
        spans, span_range = None, (0, 0)
        if len(asked.spans):
            if number not in self._spans:
                self._spans[number] = _to_device(asked.spans.astype(np.int32), device)
            spans, span_range = self._spans[number], (int(asked.spans[:, 0].min()), int(asked.spans[:, 1].max()))
        measure = prompt_rows if latent is None else partial(latent_prompt_rows, latent, free_bytes=left)
        numbers = measure(
            queries,
            keys,
            table,
            PromptChunk(0, asked.num_rows, asked.position),
            layer.params,
            self._on_device(chosen, device),
            spans=spans,
            span_range=span_range,
            squares=asked.squares,
            sink_tokens=self._sink_tokens,
            local_window=self._local_window,
        )
        vectors: dict[str, Tensor] = {}
        if asked.grams or asked.kept:
            if latent is not None:  # as those of generated rows
                queries = absorbed_queries(latent, queries)
            new_keys = sequence_keys(keys, table, min(asked.keys_from, asked.num_keys), asked.num_keys)
            vectors = self._vectors(asked, chosen, group, layer.params, queries, new_keys)
        return PromptAnswers(group=group, **numbers._asdict(), **vectors)

    def _vectors(
        self,
        asked: AskedPrompt,
        chosen: tuple[int, ...],
        group: int,
        params: LayerParams,
        queries: Tensor,
        keys: Tensor,
    ) -> dict[str, Tensor]:
        """What is made of the rows' queries [N, H, D] and of the keys [n, Hkv, D], by name."""
        heads = self._on_device(chosen, queries.device).long()
        owners = self._on_device(tuple(kv_heads(chosen, group)), queries.device).long()
        q, k = _without_fp8(queries).index_select(1, heads), _without_fp8(keys).index_select(1, owners)
        q_scale, k_scale = _of_heads(params.q_scale, heads // group), _of_heads(params.k_scale, owners)
        found: dict[str, Tensor] = {}
        if asked.grams:
            found |= {"query_gram": gram(q, q_scale), "key_gram": gram(k, k_scale)}
        if asked.kept:
            found |= {"queries": scaled(q, q_scale), "keys": scaled(k, k_scale)}
            found["score_params"] = _score_params(params, heads)
        return found

    def _on_device(self, heads: tuple[int, ...], device: torch.device) -> Tensor:
        if heads not in self._heads:
            self._heads[heads] = _to_device(np.array(heads, dtype=np.int32), device)
        return self._heads[heads]

    def _count_missing(self) -> None:
        missing = sum(len(local_layers) for _, _, local_layers in self.missing())
        if missing:
            error = UnmeasuredPromptError(f"{missing} layers of whole prompts did not run in Python in a step")
            self._errors.count("prompt", error)
            log_once(
                logger,
                logging.WARNING,
                "prompt-graph",
                "Rows of a whole prompt (glassbox_prompt) are missing from its trace: vLLM replayed a CUDA graph for a "
                "batch with a prompt in it. Use cudagraph_mode FULL_AND_PIECEWISE, vLLM's default, not FULL. Further "
                "ones are only counted (glassbox_errors_total{stage='prompt'}).",
            )


def probed_vectors(
    queries: Tensor, caches: Sequence[Tensor], params: Sequence[LayerParams], block_table: Tensor, places: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries and own keys of probed rows as `ProbeAnswers` has them.

    Args:
        queries: [R, L, H, D]; caches, params: of the L layers, of one KV-cache group.
        block_table: [num_seqs, max_blocks] int32, of the group.
        places: int32 [R, 2], batch row and position of each row.
    """
    batch, position = places.long().unbind(1)
    page, group = caches[0].shape[2], queries.shape[2] // caches[0].shape[1]
    blocks = block_table[batch, position // page].long()
    of_rows, keys = [], []
    for layer, (cache, of_layer) in enumerate(zip(caches, params, strict=True)):
        q_scale, k_scale = of_layer.q_scale, of_layer.k_scale
        if q_scale is not None and q_scale.numel() > 1:
            q_scale = q_scale.view(-1).repeat_interleave(group)
        of_rows.append(scaled(_without_fp8(queries[:, layer]), q_scale))
        keys.append(scaled(_without_fp8(keys_at(cache, blocks, position % page)), k_scale))
    return torch.stack(of_rows, 1), torch.stack(keys, 1)


def _score_params(params: LayerParams, heads: Tensor) -> Tensor:
    """float32 [H, 4], see `PromptAnswers.score_params`."""
    more = params.alibi_slopes is not None or params.chunk_size is not None
    known = [np.nan if more else params.scale, params.soft_cap or 0.0, params.sliding_window or 0, np.nan]
    values = _to_device(np.array(known, dtype=np.float32), heads.device).repeat(len(heads), 1)
    if params.sinks is not None:
        values[:, 3] = params.sinks.detach().float().index_select(0, heads)
    return values


def _of_heads(scale: Tensor | None, of: Tensor) -> Tensor | None:
    """The scale of each of some KV heads."""
    return scale if scale is None or scale.numel() == 1 else scale.view(-1).index_select(0, of)


def _without_fp8(vectors: Tensor) -> Tensor:
    """The same numbers in a type that can be indexed and multiplied."""
    return vectors.to(torch.bfloat16) if vectors.element_size() == 1 else vectors


def scaled(vectors: Tensor, scale: Tensor | None) -> Tensor:
    """float32 [..., H, D], with the scale [1] or [H] that their quantisation left out."""
    return vectors.float() if scale is None else vectors.float() * scale.view(-1, 1)


def _needed_bytes(asked: AskedPrompt, num_heads: int, queries: Tensor, keys: Tensor, *, latent: bool) -> int:
    """Bytes that a prompt's answers in a layer take, and what is there while they are computed, rather too many.

    Args:
        num_heads: of the layer; latent: its attention is, whose keys of heads are not among these bytes.
    """
    heads = len([head for head in asked.heads if head < num_heads])
    rows, num_keys, (num_kv_heads, _, size) = asked.num_rows, asked.num_keys, keys.shape[1:]
    # Statistics, the flag, the mass before, the reference of both passes, and spans; what positions receive.
    numbers = 4 * heads * (rows * (NUM_STATISTICS + 4 + len(asked.spans)) + num_keys * (1 + asked.squares))
    # Of latent attention those of some heads at a time, which are then put together.
    needed = numbers * (1 + latent) + (latent_bytes(queries, keys, num_keys) if latent else 0)
    if asked.grams or asked.kept:
        # Whole pages of them.
        new_keys = num_keys - min(asked.keys_from, num_keys) + 2 * keys.shape[2]
        # Queries of all heads, absorbed or without FP8, and keys as they are stored, in order, and without FP8.
        of_layer = queries.shape[1] * rows * max(queries.element_size(), 2)
        of_layer += num_kv_heads * new_keys * (2 * keys.element_size() + 2)
        # Of chosen heads as they are, and twice in float64, in which sums are made of float32.
        of_heads = (heads * rows + min(heads, num_kv_heads) * new_keys) * (max(queries.element_size(), 2) + 16)
        needed += size * (of_layer + of_heads) + 3 * 8 * heads * size * size
    return needed


def _nbytes(answers: PromptAnswers[Tensor]) -> int:
    sizes: list[int] = []
    answers.moved(lambda one: sizes.append(one.nbytes) or one)  # type: ignore[func-returns-value]
    return sum(sizes)


def _to_numpy(values: Tensor) -> npt.NDArray:
    return values.cpu().numpy()


def _to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Queue a copy from pinned memory of its own, where there is a GPU; nothing waits for it."""
    source = torch.from_numpy(np.ascontiguousarray(values))
    return (source.pin_memory() if device.type == "cuda" else source).to(device, non_blocking=True)
