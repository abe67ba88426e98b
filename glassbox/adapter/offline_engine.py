"""`vllm.LLM` in the words of `processes/offline.py`: what it is asked, and what it answers."""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol


class Completion(Protocol):
    """vllm.outputs.CompletionOutput."""

    text: str


class RequestOutput(Protocol):
    """vllm.RequestOutput."""

    request_id: str
    outputs: Sequence[Completion]


class OfflineParams(Protocol):
    """vllm.SamplingParams, as far as `LLM.generate` is given them."""

    n: int
    extra_args: Mapping[str, Any] | None


class OfflineEngine(Protocol):
    """vllm.LLM."""

    llm_engine: Any

    def get_default_sampling_params(self) -> OfflineParams: ...

    def get_tokenizer(self) -> Any: ...

    def generate(
        self, prompts: Sequence[Any], sampling_params: Sequence[OfflineParams], *, use_tqdm: bool
    ) -> Sequence[RequestOutput]: ...


@dataclass(frozen=True)
class Answered:
    """One prompt's answers.

    Attributes:
        request_id: external id.
        texts: one per answer (n > 1).
        output: vLLM's own.
    """

    request_id: str
    texts: tuple[str, ...]
    output: RequestOutput


def load_engine(model: str, arguments: Mapping[str, Any]) -> OfflineEngine:
    """A vllm.LLM.

    Args:
        model: name or folder.
        arguments: further ones of `LLM`.
    """
    from vllm import LLM

    engine: OfflineEngine = LLM(model, **arguments)
    return engine


def max_model_len(llm: OfflineEngine) -> int:
    """Most tokens of prompt and answer together."""
    length: int = llm.llm_engine.model_config.max_model_len
    return length


def greedy_params(max_tokens: int) -> OfflineParams:
    """The most likely token each time, at most so many."""
    from vllm import SamplingParams

    params: OfflineParams = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return params


def default_params(llm: OfflineEngine) -> OfflineParams:
    """Sampling parameters of the model."""
    return llm.get_default_sampling_params()


def num_answers(params: OfflineParams) -> int:
    """Answers that a prompt with these parameters gets."""
    return params.n


def with_options(params: OfflineParams, options: Mapping[str, Any]) -> OfflineParams:
    """A copy of sampling parameters that also says this to glassbox."""
    asked = copy(params)
    asked.extra_args = {**(params.extra_args or {}), **options}
    return asked


def token_prompt(token_ids: Sequence[int]) -> dict[str, Any]:
    """A prompt of these tokens."""
    return {"prompt_token_ids": list(token_ids)}


def generate(llm: OfflineEngine, prompts: Sequence[Any], params: Sequence[OfflineParams]) -> list[Answered]:
    """Answer the prompts."""
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [Answered(out.request_id, tuple(one.text for one in out.outputs), out) for out in outputs]


def deliver_ends(llm: OfflineEngine) -> None:
    """Let the workers hear that the requests are gone, when all of them have ended.

    An engine in a process of its own does that by itself; one in this process only steps when it is told to.
    """
    engine = llm.llm_engine
    if type(engine.engine_core).__name__ == "InprocClient":
        engine.step()
