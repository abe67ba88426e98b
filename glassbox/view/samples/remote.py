"""Features of labelled samples from a running server, through its API.

Owns what is asked of the server, and how what it tells of a request becomes a trace. It needs its own routes: vLLM with
VLLM_PLUGINS=glassbox. The server has the tokenizer, so spans are given by message or by positions, not by text.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from glassbox.core.json_fields import parse_json
from glassbox.core.statistics import NUM_STATISTICS
from glassbox.core.trace_arrays import TRACE_ARRAYS
from glassbox.core.trace_options import PROMPT_KEY, MessageSpan, Span, traced_with
from glassbox.export.answer_summary import REQUESTS_PATH, trace_path
from glassbox.signals.features import ANSWER
from glassbox.store.trace_record import RequestTrace, decode_trace
from glassbox.view.asking import MAX_TRACE_BYTES, UNPACKED, Access, check_unpacked, content_of, without_user
from glassbox.view.measured import ViewError
from glassbox.view.samples.feature_table import SampleRow
from glassbox.view.samples.samples_file import Sample

if TYPE_CHECKING:
    import httpx

_PART_BYTES: Final = 32 << 20
_POLL_S: Final = 0.2
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
        signals: names of core/signal_table.py that are computed, too, of traces that are fetched whole.
        timeout_s: for an answer, and again for its trace.
    """

    url: str
    model: str
    access: Access
    max_tokens: int = 64
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    signals: tuple[str, ...] = ()
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
            base_url=self.url.rstrip("/"),
            headers={**UNPACKED, **self.access.headers},
            timeout=self.timeout_s,
            limits=limits,
        ) as client:
            return list(await asyncio.gather(*(self._row(client, sample) for sample in samples)))

    async def _row(self, client: "httpx.AsyncClient", sample: Sample) -> SampleRow:
        try:
            path, body = await self._asked(client, sample)
            answer = await self._json(client, "POST", path, body=body)
            given = sample.answer is not None
            trace = await self._trace(client, answer)
            text = sample.answer if given else _text(answer)
            start = trace.prompt_len
            if given:
                start = int(trace.span_ranges[trace.span_names.index(ANSWER), 0])
            return SampleRow.of(
                sample,
                trace,
                prompt_tokens=start,
                answer_tokens=trace.prompt_len - start if given else trace.num_generated,
                answer=text,
            )
        except SampleRefusedError as error:
            return SampleRow.without(sample, str(error))

    async def _asked(self, client: "httpx.AsyncClient", sample: Sample) -> tuple[str, dict[str, Any]]:
        """Path and body of the request."""
        if any(place.text is not None for place in sample.spans):
            raise SampleRefusedError(
                "spans by text need the model's tokenizer; with --url give positions of tokens, or a message"
            )
        spans: list[Span | MessageSpan] = []
        spans += [Span(place.name, *place.tokens) for place in sample.spans if place.tokens is not None]
        spans += [MessageSpan(place.name, place.message) for place in sample.spans if place.message is not None]
        given = sample.answer is not None
        body: dict[str, Any] = {"model": self.model, "temperature": 0.0, "max_tokens": 1 if given else self.max_tokens}
        if sample.messages is not None:
            path, messages = "/v1/chat/completions", [dict(message) for message in sample.messages]
            if given:
                messages.append({"role": "assistant", "content": sample.answer})
                body |= {"add_generation_prompt": False, "continue_final_message": True}
                spans.append(MessageSpan(ANSWER, -1))
            body["messages"] = messages
        else:
            path, body["prompt"] = "/v1/completions", sample.prompt
            if given:
                prompt = await self._tokens(client, sample.prompt, special=True)
                answer = await self._tokens(client, sample.answer, special=False)
                body["prompt"] = prompt + answer
                spans.append(Span(ANSWER, len(prompt), len(prompt) + len(answer)))
        options = traced_with(self.layers, self.heads, spans, self.signals)
        if given:  # its rows are rows of the prompt
            options[PROMPT_KEY] = "all"
        return path, {**body, "vllm_xargs": options}

    async def _tokens(self, client: "httpx.AsyncClient", text: object, *, special: bool) -> list[int]:
        if isinstance(text, tuple):
            return list(text)
        body = {"model": self.model, "prompt": text, "add_special_tokens": special}
        tokens = (await self._json(client, "POST", "/tokenize", body=body)).get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
            raise ViewError(f"{self._shown} answers in another form at /tokenize; is that a vLLM server?")
        return tokens

    async def _trace(self, client: "httpx.AsyncClient", answer: Mapping[str, Any]) -> RequestTrace:
        """With the rows that features are made of: the prompt's last one and the answer's; all if signals are, too."""
        path = trace_path(str(answer.get("id")))
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
            chosen = [{}] if self.signals else [{"tokens": tokens} for tokens in _parts(document)]
            contents = [await self._content(client, "GET", path, parameters={"format": "npz", **one}) for one in chosen]
            return _joined([decode_trace(content or b"", document["request_id"]) for content in contents])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            if isinstance(error, SampleRefusedError | ViewError):
                raise
            what = f"{type(error).__name__}: {error}"[:_SHOWN]
            raise ViewError(f"{self._shown} tells of a request in another form ({what}); use its version") from None

    async def _json(self, client: "httpx.AsyncClient", method: str, path: str, **asked: Any) -> Any:
        """What the server answers, as JSON; arguments and errors are those of `_content`."""
        content = await self._content(client, method, path, **asked)
        try:
            return None if content is None else _plain(content)
        except ValueError:
            raise ViewError(f"{self._shown}{path} must answer with JSON; is that a vLLM server?") from None

    async def _content(
        self,
        client: "httpx.AsyncClient",
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        parameters: Mapping[str, str] | None = None,
        missing_ok: bool = False,
    ) -> bytes | None:
        """What the server answers; None if it has no such request, and that is allowed.

        Raises:
            SampleRefusedError: it refuses this request.
            ViewError: it can't be asked at all.
        """
        import httpx

        try:
            # httpx's bound is of each piece.
            async with (
                asyncio.timeout(self.timeout_s),
                client.stream(method, path, json=body, params=parameters) as reply,
            ):
                check_unpacked(self._shown, reply.headers)
                content = await content_of(reply, MAX_TRACE_BYTES)
        except TimeoutError:
            raise ViewError(
                f"{self._shown}{path} had not answered after {self.timeout_s:g} s; is it overloaded?"
            ) from None
        except (httpx.HTTPError, OSError) as error:
            what = str(error) or type(error).__name__
            raise ViewError(f"{self._shown} can't be asked ({what[:_SHOWN]}); is the server there?") from None
        if content is None:
            raise ViewError(f"{self._shown} answers with more than {MAX_TRACE_BYTES >> 20} MB")
        said = content[:_SHOWN].decode("utf-8", "replace")
        if reply.status_code in {401, 403}:
            raise ViewError(f"{self._shown} wants to know who asks; give its key with GLASSBOX_API_KEY or --api-key")
        if reply.status_code == 404 and missing_ok and "request_id" in said:
            return None
        if reply.status_code == 400:
            raise SampleRefusedError(f"the server refuses it: {said}")
        if reply.status_code != 200:
            remedy = (
                "start vLLM with VLLM_PLUGINS=glassbox" if path.startswith(REQUESTS_PATH) else "is that a vLLM server?"
            )
            raise ViewError(f"{self._shown}{path} answers HTTP {reply.status_code} ({said}); {remedy}")
        return content

    @property
    def _shown(self) -> str:
        return without_user(self.url)


def _plain(content: bytes) -> Any:
    value = parse_json(content)
    if not isinstance(value, dict):
        raise ValueError("must be a mapping")
    return value


def _is_whole(document: Mapping[str, Any], answer: Mapping[str, Any]) -> bool:
    """Whether a trace has all rows of all ranks. On an idle server it stays active, although nothing is missing."""
    if document.get("status") != "active":
        return True
    if document.get("awaited_ranks"):
        return False
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


def _parts(document: Mapping[str, Any]) -> list[str]:
    """Ranges of positions, `start:end`, that together are the rows of features."""
    ranges = document["options"]["spans"]
    first, last = document["prompt_len"] - 1, document["prompt_len"] + document["num_generated"]
    if ANSWER in ranges:
        first, last = ranges[ANSWER][0] - 1, ranges[ANSWER][1]
    row_bytes = 4 * len(document["layers"]) * len(document["heads"]) * (NUM_STATISTICS + len(ranges))
    step = max(1, _PART_BYTES // max(1, row_bytes))
    return [f"{start}:{min(start + step, last)}" for start in range(max(first, 0), last, step)]


def _joined(parts: Sequence[RequestTrace]) -> RequestTrace:
    """One trace of the parts of one, each with some of its rows."""
    arrays = {
        array.name: np.concatenate([part.arrays[array.name] for part in parts])
        for array in TRACE_ARRAYS
        if array.by_token
    }
    return replace(parts[0], arrays={**parts[0].arrays, **arrays})
