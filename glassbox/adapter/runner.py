"""What is read of vLLM's model runners and workers: batches, tokens, and which of their calls is a real step.

All imports of vLLM are inside functions: importing this module loads none.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from glassbox.adapter.internals import Feature, lacks
from glassbox.adapter.protocols import (
    CachedRequest,
    CommonMetadata,
    InputBatch,
    PreparedBatch,
    RequestStates,
    Runner,
    SamplingParams,
)

# (module, class) whose `execute_model` is one engine step. The CPU runners inherit from these.
_RUNNER_CLASSES: Final = (
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner"),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner"),
)


def runner_classes() -> Iterator[type]:
    """Model runner classes that this process has imported already; imports nothing."""
    for module_name, class_name in _RUNNER_CLASSES:
        module = sys.modules.get(module_name)
        cls = getattr(module, class_name, None)
        if cls is not None:
            yield cls


@dataclass(frozen=True)
class Batch:
    """The requests of one step, in the order of the batch rows. B requests.

    Attributes:
        num_scheduled: [B] tokens of this step.
        num_computed: [B] tokens whose K and V were in the cache before it.
        prompt_len: [B] tokens of the prompt.
        query_start: [B + 1] offsets into the step's flattened tokens.
        req_ids: [B] internal ids.
    """

    num_scheduled: np.ndarray
    num_computed: np.ndarray
    prompt_len: np.ndarray
    query_start: np.ndarray
    req_ids: tuple[str, ...]


def _input_batch(runner: Runner) -> InputBatch | None:
    """Of the V1 runner."""
    return getattr(runner, "input_batch", None)


def _request_states(runner: Runner) -> RequestStates | None:
    """Of the V2 runner."""
    return getattr(runner, "req_states", None)


def read_batch(runner: Runner, prepared: PreparedBatch | None, common_attn_metadata: CommonMetadata) -> Batch:
    """The batch of the step that is being prepared, from either model runner.

    Call it from a metadata builder: then the runner has ordered its batch. Padding rows are left out.

    Args:
        runner: vLLM's.
        prepared: what the V2 runner's `prepare_inputs` returned in this step.
        common_attn_metadata: what the builder was given.

    Raises:
        AttributeError: the rows can't be found.
    """
    batch, states = _input_batch(runner), _request_states(runner)
    if batch is not None:
        n = batch.num_reqs
        num_computed = batch.num_computed_tokens_cpu[:n]
        prompt_len = batch.num_prompt_tokens[:n]
        req_ids = tuple(batch.req_ids[:n])
        query_start = common_attn_metadata.query_start_loc_cpu[: n + 1].numpy()
    elif states is not None and prepared is not None:
        # Not the metadata's req_idx: releases before 0.29 have none, nor have hybrid and encoder-decoder models.
        n = prepared.num_reqs
        index = prepared.idx_mapping_np[:n]
        num_computed = states.num_computed_tokens_np[index]
        prompt_len = states.prompt_len.np[index]
        req_ids = tuple(prepared.req_ids[:n])
        query_start = np.asarray(prepared.query_start_loc_np[: n + 1])
    else:
        raise AttributeError(
            f"{type(runner).__name__} has no input_batch, nor req_states and a prepare_inputs that was called; its "
            "rows can't be found"
        )
    return Batch(
        num_scheduled=np.diff(query_start),
        num_computed=np.asarray(num_computed),
        prompt_len=np.asarray(prompt_len),
        query_start=query_start,
        req_ids=req_ids,
    )


class BatchMismatchError(ValueError):
    """A step's batch, as glassbox reads it, is not what the scheduler asked for."""


def check_batch(batch: Batch, scheduled: Mapping[str, int], common_attn_metadata: CommonMetadata, exact: bool) -> None:
    """See that a batch is the scheduler's: its requests, their tokens, and where each one's rows begin.

    Args:
        batch: as read.
        scheduled: tokens of each request in the step, by internal id.
        common_attn_metadata: what the builder was given; sequence lengths are compared where the host has them.
        exact: whether the runner computes all scheduled tokens; it may leave out drafts, and which ones is known on the
            device alone.

    Raises:
        BatchMismatchError: it is not.
    """
    n = len(batch.req_ids)
    wanted = [scheduled.get(req_id, -1) for req_id in batch.req_ids]
    found = batch.num_scheduled.tolist()
    if len(scheduled) != n or len(set(batch.req_ids)) != n or -1 in wanted:
        raise BatchMismatchError(
            f"the requests of a batch must be the {len(scheduled)} that were scheduled, got {n}, of which "
            f"{wanted.count(-1)} were not; this step is not measured"
        )
    if found != wanted if exact else any(not 0 < a <= b for a, b in zip(found, wanted, strict=True)):
        raise BatchMismatchError(
            "the tokens of each request must be those that were scheduled; rows are in another order"
        )
    if int(batch.query_start[0]) != 0:
        raise BatchMismatchError(f"the rows of a batch must begin at 0, got {int(batch.query_start[0])}")
    seq_lens = common_attn_metadata.seq_lens
    if exact and seq_lens.device.type == "cpu" and len(seq_lens) >= n:
        lengths = seq_lens[:n].numpy()
        if not np.array_equal(lengths, batch.num_computed + batch.num_scheduled):
            raise BatchMismatchError(
                "the sequence lengths of a batch must be its computed and scheduled tokens; rows are in another order"
            )


@dataclass(frozen=True)
class RequestTokens:
    """What a runner knows of a request's tokens.

    Attributes:
        prompt: token ids; None if the prompt was given as embeddings.
        generated: token ids; of the V1 runner vLLM's own list that goes on growing, where -1 stands for those that it
            has not read back from the device.
        sampling_params: vLLM's own; None for a pooling request.
    """

    prompt: list[int] | None
    generated: list[int]
    sampling_params: SamplingParams | None


def request_tokens(runner: Runner, req_id: str) -> RequestTokens | None:
    """The tokens of a request that has not been removed yet; None in the V2 runner, which keeps them on the device."""
    requests: Mapping[str, CachedRequest] = {} if lacks(Feature.TOKENS) else getattr(runner, "requests", {})
    state = requests.get(req_id)
    if state is None:
        return None
    return RequestTokens(state.prompt_token_ids, state.output_token_ids, state.sampling_params)


@dataclass(frozen=True)
class TokenCopy:
    """The V2 runner's tokens of a request on their way to the host.

    Attributes:
        event: happens when they are there; None if they are.
        ids: [max_model_len] int32; its first `length` are the request's.
    """

    event: Any
    ids: Any
    length: Any
    prompt_len: int
    sampling_params: SamplingParams | None

    def tokens(self) -> RequestTokens:
        """The tokens; call it after the event."""
        ids: list[int] = self.ids[: int(self.length)].tolist()
        return RequestTokens(ids[: self.prompt_len], ids[self.prompt_len :], self.sampling_params)


def copy_tokens(runner: Runner, req_id: str, sampling_params: SamplingParams | None) -> TokenCopy | None:
    """Queue the copy of a request's tokens; None if the runner does not keep them on the device, or not any more.

    Call it before the runner hears that the request is gone.
    """
    import torch

    states = None if lacks(Feature.TOKENS) else _request_states(runner)
    index = None if states is None else states.req_id_to_index.get(req_id)
    if states is None or index is None:
        return None
    ids, length = (
        source.gpu[index : index + 1].flatten().to("cpu", non_blocking=True, copy=True)
        for source in (states.all_token_ids, states.total_len)
    )
    # Images with a Triton for CPUs run this runner without a GPU: there the copies are done.
    event = torch.cuda.Event() if states.total_len.gpu.is_cuda else None
    if event is not None:
        event.record()
    return TokenCopy(event, ids, length, int(states.prompt_len.np[index]), sampling_params)


def until_end(tokens: RequestTokens) -> RequestTokens:
    """The tokens of a request that is gone as its client got them: a runner may have gone on.

    A step may have kept drafts behind the last token, or have been queued before that was known on the host.
    """
    params, generated = tokens.sampling_params, tokens.generated
    if params is None:
        return tokens
    ends = {params.eos_token_id, *(params.stop_token_ids or ())}
    last = next((i for i, token in enumerate(generated) if token in ends), len(generated))
    return replace(tokens, generated=generated[: min(last + 1, params.max_tokens or len(generated))])


def was_aborted(tokens: RequestTokens, max_model_len: int) -> bool:
    """Whether a request that is gone can't have ended by itself.

    The scheduler tells workers that a request is gone, not why. These are its own rules
    (vllm/v1/core/sched/utils.py::check_stop); stop strings are found in the API server, so with them it can't be told.
    """
    params = tokens.sampling_params
    if params is None or params.stop or getattr(params, "repetition_detection", None) is not None:
        return False
    generated = tokens.generated
    prompt_len = len(tokens.prompt) if tokens.prompt is not None else 0
    if generated and (generated[-1] == -1 or generated[-1] in {params.eos_token_id, *(params.stop_token_ids or ())}):
        return False
    return len(generated) < (params.max_tokens or 0) and prompt_len + len(generated) < max_model_len


def is_dummy_run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True for the V2 runner's `execute_model(scheduler_output, intermediate_tensors, dummy_run, ...)` without work."""
    return bool(kwargs.get("dummy_run", args[1] if len(args) > 1 else False))


def is_piecewise_forward() -> bool:
    """True while a forward pass runs that is captured, or replayed, in pieces around the attention."""
    if lacks(Feature.PIECEWISE):
        return False
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import get_forward_context, is_forward_context_available

    return is_forward_context_available() and get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE
