"""Features of labelled samples, from `vllm.LLM`: each is asked, or read with its answer, and its trace summed up.

Owns what becomes of a sample on its way to a row: its tokens, the places of its spans, the options of its request, and
what is said of one that can't be asked. The engine is `adapter/offline_engine.py`'s, waiting for traces `offline.py`'s.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from glassbox.adapter.offline_engine import (
    OfflineEngine,
    greedy_params,
    load_engine,
    max_model_len,
    token_prompt,
    with_options,
)
from glassbox.core.trace_options import MessageSpan, OptionError, Span, parse_options, traced_with
from glassbox.processes.api_server.message_spans import resolve
from glassbox.processes.offline import see_that_it_is_observed, traced
from glassbox.signals.features import ANSWER
from glassbox.store.trace_record import RequestTrace
from glassbox.view.samples.feature_table import SampleRow
from glassbox.view.samples.samples_file import Sample, SpanPlace

# A sample's rows are summed up and forgotten: of a prompt its last row unless answers stand in the prompts.
_CONFIG: Final = """\
sample_rate: 0
sampling: {{prefill_rows_per_request: {prompt_rows}, max_rows_per_step: 4096}}
requests:
  max_active: 1024
  max_trace_mb: 4096
  max_active_mb: 65536
  keep: 2048
  keep_mb: 65536
export: {{interval_s: 0.2, prometheus: {{enabled: false}}}}
"""
_ALL_ROWS: Final = 4096


class SampleProblemError(ValueError):
    """A sample can't be asked; the message says why."""


@dataclass(frozen=True)
class _Prepared:
    """Tokens of a sample: of its prompt, and of its answer if that is given; and where its spans are."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    spans: tuple[Span, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + self.answer


@dataclass(frozen=True)
class _Asked:
    """A sample that was asked: what of it was sent, the model's text, and the trace of both."""

    prepared: _Prepared
    generated: str
    trace: RequestTrace


class Extractor:
    """Makes rows of samples.

    Args:
        llm: a vllm.LLM, made after glassbox was installed; without prefix caching, or the rows of prompts that begin
            alike are missing.
        max_tokens: of an answer that the model gives; it is the most likely one.
        layers, heads: global indices; None is all.
        signals: names of core/signal_table.py that are computed, too.
        timeout_s: how long to wait for the traces once their answers are there.
    """

    def __init__(
        self,
        llm: OfflineEngine,
        *,
        max_tokens: int = 64,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        signals: Sequence[str] = (),
        timeout_s: float = 120.0,
    ) -> None:
        self._llm, self._max_tokens, self._timeout_s = llm, max_tokens, timeout_s
        self._layers, self._heads, self._signals = layers, heads, signals
        self._tokenizer = llm.get_tokenizer()

    @staticmethod
    def config(samples: Sequence[Sample]) -> str:
        """The YAML with which these samples are best measured."""
        given = any(sample.answer is not None for sample in samples)
        return _CONFIG.format(prompt_rows=_ALL_ROWS if given else 1)

    @staticmethod
    def load_engine(model: str, arguments: Mapping[str, Any]) -> OfflineEngine:
        """An engine as it should be; the arguments are further ones of `vllm.LLM`."""
        return load_engine(model, {"enable_prefix_caching": False, "enforce_eager": True, **arguments})

    def rows(self, samples: Sequence[Sample]) -> list[SampleRow]:
        """A row for each sample, in their order.

        Raises:
            RuntimeError: no attention of the model is observed, or traces are missing.
        """
        return [
            SampleRow.without(sample, str(asked)) if isinstance(asked, SampleProblemError) else _row(sample, asked)
            for sample, asked in zip(samples, self._ask(samples), strict=True)
        ]

    def traces(self, samples: Sequence[Sample]) -> list[RequestTrace | SampleProblemError]:
        """The trace of each sample, in their order, or why it can't be asked.

        Raises:
            RuntimeError: as for `rows`.
        """
        return [asked if isinstance(asked, SampleProblemError) else asked.trace for asked in self._ask(samples)]

    def _ask(self, samples: Sequence[Sample]) -> list[_Asked | SampleProblemError]:
        see_that_it_is_observed()
        prepared: dict[int, _Prepared] = {}
        found: dict[int, _Asked | SampleProblemError] = {}
        for i, sample in enumerate(samples):
            try:
                prepared[i] = self._prepare(sample)
            except SampleProblemError as error:
                found[i] = error
        prompts = [token_prompt(one.tokens) for one in prepared.values()]
        params = [
            with_options(greedy_params(1 if one.answer else self._max_tokens), self._options(one.spans))
            for one in prepared.values()
        ]
        answered, traces = traced(self._llm, prompts, params, timeout_s=self._timeout_s)
        for (i, one), answer, of_sample in zip(prepared.items(), answered, traces, strict=True):
            found[i] = _Asked(one, answer.texts[0], of_sample[0])
        return [found[i] for i in range(len(samples))]

    def _options(self, spans: Sequence[Span]) -> dict[str, Any]:
        return traced_with(self._layers, self._heads, spans, self._signals)

    def _prepare(self, sample: Sample) -> _Prepared:
        """Tokens and spans of a sample.

        Raises:
            SampleProblemError: it can't be asked.
        """
        if sample.messages is not None:
            prompt, spans = self._of_messages(sample)
        else:
            prompt, spans = self._of_prompt(sample)
        # Apart, as a served answer's tokens are: they follow the prompt's, and are never joined with them.
        answer = () if sample.answer is None else tuple(self._tokenizer.encode(sample.answer, add_special_tokens=False))
        if answer:
            spans = [*spans, Span(ANSWER, len(prompt), len(prompt) + len(answer))]
        length, most = len(prompt) + len(answer), max_model_len(self._llm)
        if not prompt or length >= most:
            raise SampleProblemError(f"must have 1 to {most - 1} tokens with its answer, got {length}")
        try:
            parse_options(self._options(spans))
        except OptionError as error:
            raise SampleProblemError(str(error)) from None
        return _Prepared(prompt, answer, tuple(spans))

    def _of_prompt(self, sample: Sample) -> tuple[tuple[int, ...], list[Span]]:
        if any(place.message is not None for place in sample.spans):
            raise SampleProblemError("spans by message need messages; give a text, or positions of tokens")
        if isinstance(sample.prompt, tuple):
            if any(place.text is not None for place in sample.spans):
                raise SampleProblemError("spans by text need a prompt of text; give positions of tokens")
            return sample.prompt, [_by_tokens(place) for place in sample.spans]
        text = sample.prompt or ""
        tokens = tuple(self._tokenizer.encode(text))
        return tokens, self._places(sample.spans, text, tokens, special=True)

    def _of_messages(self, sample: Sample) -> tuple[tuple[int, ...], list[Span]]:
        messages = [dict(message) for message in sample.messages or ()]
        text = self._render(messages)
        tokens = tuple(self._tokenizer.encode(text, add_special_tokens=False))
        spans = self._places(sample.spans, text, tokens, special=False)
        wanted = [MessageSpan(place.name, place.message) for place in sample.spans if place.message is not None]
        if wanted:
            spans += self._of_wanted(wanted, messages, tokens)
        return tokens, spans

    def _of_wanted(self, wanted: Sequence[MessageSpan], messages: list[Any], tokens: Sequence[int]) -> list[Span]:
        """Spans by message, as the API server finds them."""

        async def render(changed: list[Any]) -> str | None:
            return self._render(changed)

        async def tokenize(text: str) -> tuple[Sequence[int], Sequence[tuple[int, int]]] | None:
            return tokens, self._offsets(text, special=False)

        try:
            return asyncio.run(resolve(wanted, messages, tokens, render, tokenize))
        except OptionError as error:
            raise SampleProblemError(str(error)) from None

    def _render(self, messages: list[Any]) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template may raise whatever it likes
            raise SampleProblemError(f"the chat template refuses its messages: {str(error)[:200]}") from None
        return text

    def _places(self, places: Sequence[SpanPlace], text: str, tokens: Sequence[int], *, special: bool) -> list[Span]:
        """Spans by tokens, and by text that stands in the prompt once."""
        spans = [_by_tokens(place) for place in places if place.tokens is not None]
        by_text = [place for place in places if place.text is not None]
        offsets = self._offsets(text, special=special) if by_text else []
        for place in by_text:
            wanted = place.text or ""
            if text.count(wanted) != 1:
                raise SampleProblemError(
                    f"the span {place.name} must be a text that stands in the prompt once, it does "
                    f"{text.count(wanted)} times; give more of it, or positions of tokens"
                )
            begin = text.index(wanted)
            end = begin + len(wanted)
            inside = [i for i, (start, stop) in enumerate(offsets) if start < end and stop > begin]
            spans.append(Span(place.name, inside[0], inside[-1] + 1))
        return spans

    def _offsets(self, text: str, *, special: bool) -> Sequence[tuple[int, int]]:
        if not getattr(self._tokenizer, "is_fast", False):
            raise SampleProblemError("spans by text and by message need a fast tokenizer; give positions of tokens")
        found = self._tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        offsets: Sequence[tuple[int, int]] = found["offset_mapping"]
        return offsets


def _by_tokens(place: SpanPlace) -> Span:
    assert place.tokens is not None
    return Span(place.name, *place.tokens)


def _row(sample: Sample, asked: _Asked) -> SampleRow:
    prepared, trace = asked.prepared, asked.trace
    given = bool(prepared.answer)
    return SampleRow.of(
        sample,
        trace,
        prompt_tokens=len(prepared.prompt),
        answer_tokens=len(prepared.answer) if given else trace.num_generated,
        answer=sample.answer if given else asked.generated,
    )
