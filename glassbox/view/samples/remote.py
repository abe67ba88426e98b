"""Features of labelled samples from a running server, through its API.

Owns what is asked of the server, and how what it tells of a request becomes a trace. It needs its own routes: vLLM with
VLLM_PLUGINS=glassbox. The server has the tokenizer, so spans are given by message or by positions, not by text.
"""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import numpy as np

from glassbox.core.statistics import INDEX, NUM_STATISTICS, PHASES
from glassbox.core.trace_arrays import TRACE_ARRAYS, without_values
from glassbox.core.trace_options import (
    CHOICE_KEY,
    HEADS_KEY,
    LAYERS_KEY,
    PROMPT_KEY,
    SPANS_KEY,
    MessageSpan,
    Span,
    TraceOptions,
)
from glassbox.signals.features import ANSWER, features
from glassbox.store.trace_record import RequestTrace
from glassbox.view.asking import Access, without_user
from glassbox.view.measured import ViewError
from glassbox.view.samples.feature_table import SampleRow
from glassbox.view.samples.samples_file import Sample

if TYPE_CHECKING:
    import httpx

TRACES: Final = "/glassbox/v1/requests/"
MAX_ANSWER_BYTES: Final = 64 << 20
_POLL_S: Final = 0.2
# Of an answer's numbers, which the server bounds at 500,000.
_NUMBERS: Final = 400_000
_SHOWN: Final = 300


class SampleRefusedError(ValueError):
    """The server can't be asked this sample; the message says why."""


@dataclass(frozen=True)
class RemoteModel:
    """A model that a server serves.

    Attributes:
        url: of the server, without /v1.
        model: its name there.
        access: what the server is sent.
        max_tokens: of an answer that the model gives.
        layers, heads: global indices; None is all.
        timeout_s: for an answer, and again for its trace.
    """

    url: str
    model: str
    access: Access
    max_tokens: int = 64
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    timeout_s: float = 300.0

    def rows(self, samples: Sequence[Sample]) -> list[SampleRow]:
        """A row for each sample, in their order; all are asked at once.

        Raises:
            ViewError: the server isn't there, wants to know who asks, or doesn't show traces.
        """
        return asyncio.run(self._rows(samples))

    async def _rows(self, samples: Sequence[Sample]) -> list[SampleRow]:
        import httpx

        limits = httpx.Limits(max_connections=len(samples))
        async with httpx.AsyncClient(
            base_url=self.url.rstrip("/"), headers=self.access.headers, timeout=self.timeout_s, limits=limits
        ) as client:
            return list(await asyncio.gather(*(self._row(client, sample) for sample in samples)))

    async def _row(self, client: "httpx.AsyncClient", sample: Sample) -> SampleRow:
        try:
            path, body = await self._asked(client, sample)
            answer = await self._json(client, "POST", path, body)
            given = sample.answer is not None
            trace = await self._trace(client, answer)
            text = sample.answer if given else _text(answer)
            start = trace.prompt_len
            if given:
                start = int(trace.span_ranges[trace.span_names.index(ANSWER), 0])
            return SampleRow(
                sample=sample.index,
                id=sample.id,
                label=sample.label,
                group=sample.group,
                problem=None,
                truncated=trace.truncated,
                prompt_tokens=start,
                answer_tokens=trace.prompt_len - start if given else trace.num_generated,
                answer=text,
                features=features(trace),
            )
        except SampleRefusedError as error:
            return SampleRow(
                sample.index, sample.id, sample.label, sample.group, str(error), False, 0, 0, sample.answer
            )

    async def _asked(self, client: "httpx.AsyncClient", sample: Sample) -> tuple[str, dict[str, Any]]:
        """Path and body of the request."""
        if any(place.text is not None for place in sample.spans):
            raise SampleRefusedError(
                "spans by text need the model's tokenizer; with --url give positions of tokens, or a message"
            )
        spans = [str(Span(place.name, *place.tokens)) for place in sample.spans if place.tokens is not None]
        spans += [str(MessageSpan(place.name, place.message)) for place in sample.spans if place.message is not None]
        given = sample.answer is not None
        body: dict[str, Any] = {"model": self.model, "temperature": 0.0, "max_tokens": 1 if given else self.max_tokens}
        if sample.messages is not None:
            path, messages = "/v1/chat/completions", [dict(message) for message in sample.messages]
            if given:
                messages.append({"role": "assistant", "content": sample.answer})
                body |= {"add_generation_prompt": False, "continue_final_message": True}
                spans.append(str(MessageSpan(ANSWER, -1)))
            body["messages"] = messages
        else:
            path, body["prompt"] = "/v1/completions", sample.prompt
            if given:
                prompt = await self._tokens(client, sample.prompt, special=True)
                answer = await self._tokens(client, sample.answer, special=False)
                body["prompt"] = prompt + answer
                spans.append(str(Span(ANSWER, len(prompt), len(prompt) + len(answer))))
        options: dict[str, Any] = {CHOICE_KEY: "trace"}
        if self.layers is not None:
            options[LAYERS_KEY] = list(self.layers)
        if self.heads is not None:
            options[HEADS_KEY] = list(self.heads)
        if spans:
            options[SPANS_KEY] = spans
        if given:  # its rows are rows of the prompt
            options[PROMPT_KEY] = "all"
        return path, {**body, "vllm_xargs": options}

    async def _tokens(self, client: "httpx.AsyncClient", text: object, *, special: bool) -> list[int]:
        if isinstance(text, tuple):
            return list(text)
        body = {"model": self.model, "prompt": text, "add_special_tokens": special}
        tokens = (await self._json(client, "POST", "/tokenize", body)).get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
            raise ViewError(f"{self._shown} answers in another form at /tokenize; is that a vLLM server?")
        return tokens

    async def _trace(self, client: "httpx.AsyncClient", answer: Mapping[str, Any]) -> RequestTrace:
        """Of the rows that features are made of: the prompt's last one and the answer's."""
        path = TRACES + quote(str(answer.get("id")), safe="")
        deadline = time.monotonic() + self.timeout_s
        while True:
            document = await self._json(client, "GET", path, missing_ok=True)
            if document is not None and _is_whole(document, answer):
                break
            if time.monotonic() > deadline:
                raise SampleRefusedError(
                    "the server has no whole trace of it; see glassbox_trace_refused_total there, and requests.keep"
                )
            await asyncio.sleep(_POLL_S)
        try:
            places = len(document["layers"]) * len(document["heads"])
            ranges = document["options"]["spans"]
            end = document["prompt_len"] + document["num_generated"]
            first, last = document["prompt_len"] - 1, end
            if ANSWER in ranges:
                first, last = ranges[ANSWER][0] - 1, ranges[ANSWER][1]
            step = max(1, _NUMBERS // max(1, places * (NUM_STATISTICS + 8 + len(ranges))))
            parts = []
            for start in range(max(first, 0), last, step):
                tokens = f"{start}:{min(start + step, last)}"
                chosen = {"layers": "all", "heads": "all", "tokens": tokens}
                part = await self._json(client, "GET", path, parameters=chosen)
                parts.append(part["detail"])
            return _made(document, parts)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            if isinstance(error, SampleRefusedError | ViewError):
                raise
            what = f"{type(error).__name__}: {error}"[:_SHOWN]
            raise ViewError(f"{self._shown} tells of a request in another form ({what}); use its version") from None

    async def _json(
        self,
        client: "httpx.AsyncClient",
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        parameters: Mapping[str, str] | None = None,
        missing_ok: bool = False,
    ) -> Any:
        """What the server answers.

        Raises:
            SampleRefusedError: it refuses this request.
            ViewError: it can't be asked at all.
        """
        import httpx

        try:
            async with client.stream(method, path, json=body, params=parameters) as reply:
                content = bytearray()
                async for part in reply.aiter_bytes():
                    content += part
                    if len(content) > MAX_ANSWER_BYTES:
                        raise ViewError(f"{self._shown} answers with more than {MAX_ANSWER_BYTES >> 20} MB")
        except (httpx.HTTPError, OSError) as error:
            what = str(error) or type(error).__name__
            raise ViewError(f"{self._shown} can't be asked ({what[:_SHOWN]}); is the server there?") from None
        said = content[:_SHOWN].decode("utf-8", "replace")
        if reply.status_code in {401, 403}:
            raise ViewError(f"{self._shown} wants to know who asks; give its key with GLASSBOX_API_KEY or --api-key")
        if reply.status_code == 404 and missing_ok and "request_id" in said:
            return None
        if reply.status_code == 400:
            raise SampleRefusedError(f"the server refuses it: {said}")
        if reply.status_code != 200:
            remedy = "start vLLM with VLLM_PLUGINS=glassbox" if path.startswith(TRACES) else "is that a vLLM server?"
            raise ViewError(f"{self._shown}{path} answers HTTP {reply.status_code} ({said}); {remedy}")
        try:
            return _plain(content)
        except ValueError:
            raise ViewError(f"{self._shown}{path} must answer with JSON; is that a vLLM server?") from None

    @property
    def _shown(self) -> str:
        return without_user(self.url)


def _plain(content: bytes | bytearray) -> Any:
    value = json.loads(content)
    if not isinstance(value, dict):
        raise ValueError("must be a mapping")
    return value


def _is_whole(document: Mapping[str, Any], answer: Mapping[str, Any]) -> bool:
    """Whether a trace has all rows. On an idle server it stays active, although nothing is missing."""
    if document.get("status") != "active":
        return True
    usage = answer.get("usage") or {}
    try:
        end: int = usage["prompt_tokens"] + usage["completion_tokens"] - 1
        positions: list[int] = document["tokens"]["position"]
        return bool(positions) and positions[-1] >= end - 1
    except (KeyError, TypeError):
        return False


def _text(answer: Mapping[str, Any]) -> str | None:
    choices = answer.get("choices") or [{}]
    text = choices[0].get("text") or (choices[0].get("message") or {}).get("content")
    return text if isinstance(text, str) else None


def _made(document: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> RequestTrace:
    """A trace of some rows, as the server tells it."""
    layers, heads = tuple(document["layers"]), tuple(document["heads"])
    ranges: dict[str, list[int]] = document["options"]["spans"]
    rows = sum(len(part["position"]) for part in parts)
    sizes = {"token": rows, "layer": len(layers), "head": len(heads), "top_k": 0, "span": len(ranges)}
    arrays = without_values(sizes)
    at = 0
    for part in parts:
        here = slice(at, at := at + len(part["position"]))
        arrays["positions"][here] = part["position"]
        arrays["phases"][here] = [[phase.value for phase in PHASES].index(name) for name in part["phase"]]
        for name, values in part["statistics"].items():
            if name in INDEX:
                arrays["stats"][here, ..., INDEX[name]] = _numbers(values)
        for s, name in enumerate(ranges):
            arrays["span_mass"][here, ..., s] = _numbers(part["spans"][name])
    return _record(document, layers, heads, ranges, arrays)


def _numbers(values: Any) -> Any:
    return np.array(values, dtype=np.float64)  # null is NaN


def _record(
    document: Mapping[str, Any],
    layers: tuple[int, ...],
    heads: tuple[int, ...],
    ranges: Mapping[str, Sequence[int]],
    arrays: dict[str, Any],
) -> RequestTrace:
    sizes = {"span": len(ranges), "layer": len(layers), "head": len(heads)}
    whole = {array.name: arrays.get(array.name, array.filled(sizes)) for array in TRACE_ARRAYS}
    whole["span_ranges"] = np.array(list(ranges.values()), dtype=np.int32).reshape(-1, 2)
    return RequestTrace(
        request_id=document["request_id"],
        internal_id=document["internal_id"],
        engine=document["engine"],
        rank=0,
        model_name=document["model_name"],
        instance="",
        requested_model=document["requested_model"],
        adapter=document["adapter"],
        client=None,
        why=document["why"],
        status=document["status"],
        start_time_s=document["start_time_s"],
        end_time_s=document["end_time_s"],
        prompt_len=document["prompt_len"],
        num_generated=document["num_generated"],
        traceparent=None,
        layers=layers,
        heads=heads,
        options=TraceOptions(spans=tuple(Span(name, *map(int, ends)) for name, ends in ranges.items())),
        truncated=document["truncated"],
        span_names=tuple(ranges),
        arrays=whole,
    )
