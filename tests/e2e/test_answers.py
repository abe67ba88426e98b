"""Answers that speak of their own request, and traces for programs: real clients of the APIs, and glassbox's."""

import asyncio
import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import anthropic
import httpx
import numpy as np
import openai
import pytest

from glassbox.client import AsyncGlassboxClient, GlassboxClient, Trace
from glassbox.store.trace_directory import TraceDirectory
from tests.serving import EFFECT_S, MODEL_NAME, GlassboxServer
from tests.waiting import require_within, seconds_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

MESSAGES: Any = [{"role": "user", "content": "Which harbour has the oldest lighthouse?"}]
ASKED = {"glassbox": "trace", "glassbox_respond": 1}
TOKENS = 8
ROOT = Path(__file__).resolve().parents[2]
PATH = "/glassbox/v1/requests"
# What a document and a summary say alike.
ALIKE = ("request_id", "internal_id", "status", "prompt_len", "num_generated", "num_rows", "truncated", "signals")


def options(xargs: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """Of a chat: greedy, of a known length."""
    extra = {"ignore_eos": True, **({} if xargs is None else {"vllm_xargs": xargs})}
    return {
        "model": MODEL_NAME, "messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0, "extra_body": extra, **fields
    }  # fmt: skip


@pytest.fixture
def api(server: GlassboxServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120.0, max_retries=0)


@pytest.fixture
def async_api(server: GlassboxServer) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120.0, max_retries=0)


def text_of(chunks: list[Any]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def check(server: GlassboxServer, summary: Any, count: int = 1) -> None:
    """Each choice is there, and says what the server shows under the path that it names."""
    choices = summary["choices"]
    assert list(range(count)) == [choice["index"] for choice in choices]
    for choice in choices:
        assert "missing" not in choice, choice
        document = httpx.get(server.url + choice["trace"], timeout=60.0).raise_for_status().json()
        assert {name: document[name] for name in ALIKE} == {name: choice[name] for name in ALIKE}
        assert {name: document["scores"][name] for name in ("probes", "signals")} == {
            name: choice["scores"][name] for name in ("probes", "signals")
        }
        trace = TraceDirectory(server.run_dir).get(choice["internal_id"])
        assert trace is not None
        for phase, means in choice["means"].items():
            rows = trace.stats[trace.phases == ("prefill", "decode").index(phase)]
            assert means["sink_ratio"] == pytest.approx(rows[..., 4].mean(dtype=float), rel=1e-5)


class TestSummary:
    def test_whole(self, server: GlassboxServer, api: openai.OpenAI) -> None:
        """The same tokens with and without; who doesn't ask gets nothing."""
        plain = api.chat.completions.create(**options())
        traced = api.chat.completions.create(**options({"glassbox": "trace"}))
        asked = api.chat.completions.create(**options(ASKED))
        assert not hasattr(plain, "glassbox")
        assert not hasattr(traced, "glassbox")
        check(server, asked.glassbox)  # type: ignore[attr-defined]
        assert plain.choices[0].message.content == asked.choices[0].message.content
        assert plain.usage == asked.usage

    @pytest.mark.parametrize("more", [{}, {"stream_options": {"include_usage": True}}])
    def test_streamed(self, server: GlassboxServer, api: openai.OpenAI, more: dict[str, Any]) -> None:
        """In the last chunk, which is the usage chunk if there is one; all others are the same as without."""
        plain = list(api.chat.completions.create(**options(), stream=True, **more))
        asked = list(api.chat.completions.create(**options(ASKED), stream=True, **more))
        assert text_of(plain) == text_of(asked)
        assert len(asked) == len(plain) + (0 if more else 1)
        assert [] == [chunk for chunk in (*plain, *asked[:-1]) if hasattr(chunk, "glassbox")]
        check(server, asked[-1].glassbox)
        assert [] == asked[-1].choices
        assert (plain[-1].usage if more else None) == asked[-1].usage

    def test_named_signals(self, server: GlassboxServer, api: openai.OpenAI) -> None:
        """With their values, of log-probabilities, too, which come from this very process."""
        answer: Any = api.chat.completions.create(**options({**ASKED, "glassbox_signals": ["rauq", "laplacian"]}))
        check(server, answer.glassbox)
        signals = answer.glassbox["choices"][0]["scores"]["signals"]
        assert {"rauq", "laplacian"} == signals.keys()
        assert [] == [one for one in signals.values() if "refused" in one or None in one["values"].values()]

    def test_asyncio(self, server: GlassboxServer, async_api: openai.AsyncOpenAI) -> None:
        """Whole and streamed at once."""

        async def ask() -> tuple[Any, list[Any]]:
            async def streamed() -> list[Any]:
                stream = await async_api.chat.completions.create(**options(ASKED), stream=True)
                return [chunk async for chunk in stream]

            return await asyncio.gather(async_api.chat.completions.create(**options(ASKED)), streamed())

        whole, chunks = asyncio.run(ask())
        check(server, whole.glassbox)
        check(server, chunks[-1].glassbox)
        assert whole.choices[0].message.content == text_of(chunks)

    @pytest.mark.parametrize("stream", [False, True])
    def test_samples(self, server: GlassboxServer, api: openai.OpenAI, stream: bool) -> None:
        """One of each choice."""
        answer = api.chat.completions.create(**{**options(ASKED), "n": 2, "temperature": 1.0}, stream=stream)
        check(server, list(answer)[-1].glassbox if stream else answer.glassbox, 2)

    def test_completions(self, server: GlassboxServer, api: openai.OpenAI) -> None:
        """Of several prompts with several samples, in the order of the choices."""
        extra = {"vllm_xargs": ASKED, "ignore_eos": True}
        answer: Any = api.completions.create(
            model=MODEL_NAME, prompt=["The sea", "A lighthouse in the fog"], n=2, max_tokens=4, extra_body=extra
        )
        check(server, answer.glassbox, 4)
        lengths = [choice["prompt_len"] for choice in answer.glassbox["choices"]]
        assert lengths[0] == lengths[1] < lengths[2] == lengths[3]

    def test_responses(self, server: GlassboxServer, api: openai.OpenAI) -> None:
        """In the response, also in the one that a stream ends with."""
        asked: Any = {"model": MODEL_NAME, "input": "Name a harbour.", "max_output_tokens": 4}
        asked["extra_body"] = {"vllm_xargs": ASKED}
        check(server, api.responses.create(**asked).glassbox)
        check(server, list(api.responses.create(**asked, stream=True))[-1].response.glassbox)

    def test_messages(self, server: GlassboxServer) -> None:
        """In the message, and in the event that ends a streamed one."""
        client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
        asked: Any = {"model": MODEL_NAME, "max_tokens": 4, "messages": MESSAGES, "extra_body": {"vllm_xargs": ASKED}}
        check(server, client.messages.create(**asked).glassbox)
        events: Any = list(client.messages.create(**asked, stream=True))
        assert "message_stop" == events[-1].type
        check(server, events[-1].glassbox)

    def test_many_at_once(self, server: GlassboxServer, api: openai.OpenAI) -> None:
        """Each gets its own."""
        with ThreadPoolExecutor(12) as pool:
            answers: list[Any] = list(pool.map(lambda _: api.chat.completions.create(**options(ASKED)), range(24)))
        for answer in answers:
            assert [answer.id] == [choice["request_id"] for choice in answer.glassbox["choices"]]
            check(server, answer.glassbox)

    def test_it_comes_at_once(self, server: GlassboxServer, api: openai.OpenAI) -> None:
        """Not with the next export."""
        server.edit_config(export={"interval_s": 600}, requests={"respond_wait_s": 30.0})
        time.sleep(EFFECT_S)
        answers: list[Any] = []
        ask = partial(api.chat.completions.create, **options(ASKED, max_tokens=1))
        require_within(5.0, lambda: seconds_of(lambda: answers.append(ask())))
        check(server, answers[-1].glassbox)

    def test_errors(self, api: openai.OpenAI) -> None:
        """Are what they were."""
        with pytest.raises(openai.BadRequestError, match="glassbox_respond must be true or false, got 7; use 1 or 0"):
            api.chat.completions.create(**options({**ASKED, "glassbox_respond": 7}))
        with pytest.raises(openai.BadRequestError, match='glassbox_respond must come with "glassbox": "trace"'):
            api.chat.completions.create(**options({"glassbox_respond": 1}), stream=True)


class TestClient:
    def test_a_response_in_a_trace_out(self, server: GlassboxServer, api: openai.OpenAI) -> None:
        """With a summary and without, whole and streamed, sync and asyncio: the numbers that the worker has written."""
        asked = {"glassbox": "trace", "glassbox_top_k": 3, "glassbox_spans": ["question=message:0"], "glassbox_rows": 1}
        plain = api.chat.completions.create(**options(asked))
        said = api.chat.completions.create(**options({**asked, "glassbox_respond": 1}))
        chunks = list(api.chat.completions.create(**options(asked), stream=True))

        async def ask() -> Trace:
            async with AsyncGlassboxClient(f"{server.url}/v1") as client:
                return await client.trace(said)

        with GlassboxClient(f"{server.url}/v1") as client:
            traces = [client.trace(response) for response in (plain, said, chunks[-1], said.id)]
        traces.append(asyncio.run(ask()))
        for trace in traces:
            written = TraceDirectory(server.run_dir).get(trace.record.internal_id)
            assert written is not None
            np.testing.assert_array_equal(written.stats, trace.record.stats)
            assert TOKENS - 1 == trace.tokens["phase"].to_pylist().count("decode")
            assert trace.rows.num_rows == written.stats[..., 0].size
            assert trace.attention.num_rows == trace.spans.num_rows == trace.rows.num_rows
            assert trace.signals["decode_rows"] == TOKENS - 1
        assert said.glassbox["choices"][0]["signals"] == traces[1].signals  # type: ignore[attr-defined]
        assert traces[1].plot().axes

    def test_samples(self, server: GlassboxServer, api: openai.OpenAI) -> None:
        """Each choice has its own trace, by the summary and by the id alone."""
        answer: Any = api.chat.completions.create(**{**options(ASKED), "n": 2, "temperature": 1.0})
        ids = [choice["internal_id"] for choice in answer.glassbox["choices"]]
        with GlassboxClient(server.url) as client:
            for response in (answer, answer.id):
                assert ids == [client.trace(response, choice).record.internal_id for choice in (0, 1)]


class TestDocs:
    def test_its_examples(self, server: GlassboxServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each block of docs/client.md runs as it stands, one after the other, but for address and model."""
        monkeypatch.chdir(tmp_path)
        text = (ROOT / "docs/client.md").read_text(encoding="utf-8")
        blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        assert len(blocks) >= 3
        names: dict[str, Any] = {}
        for block in blocks:
            program = block.replace("http://localhost:8000", server.url).replace('"MODEL"', repr(MODEL_NAME))
            exec(compile(program, "docs/client.md", "exec"), names)
        assert (tmp_path / "attention.png").is_file()
