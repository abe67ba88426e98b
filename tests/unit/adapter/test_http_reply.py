"""A further field in answers: where it goes in each API's whole and streamed form, and what is left as it is."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import pytest

from glassbox.adapter import http_request
from glassbox.adapter.http_reply import Reply, with_member
from glassbox.adapter.http_request import note_requests

fastapi = pytest.importorskip("fastapi", reason="comes with vLLM")

VALUE: Any = {"choices": [{"index": 0, "signals": {"entropy_mean": 0.25}}]}
HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 7, "model": "m"}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
# A model may say anything.
TEXT = 'a {"b": "c"} "choices":[] \n\ndata: [DONE]\n\n é'


def chunk(**fields: Any) -> bytes:
    return b"data: " + json.dumps({**HEAD, **fields}, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


def choice(content: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": finish_reason}]}


def event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


CHAT = [chunk(**choice("")), chunk(**choice(TEXT)), chunk(**choice("", "stop"))]
DONE = b"data: [DONE]\n\n"
WHOLE = {
    **HEAD,
    "object": "chat.completion",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": TEXT}}],
}
ENDED = {"id": "resp_1", "status": "completed", "output": []}
STREAMS: dict[str, list[bytes]] = {
    "chat": [*CHAT, DONE],
    "usage": [*CHAT, chunk(choices=[], usage=USAGE), DONE],
    # As a middleware may hand it on.
    "at once": [b"".join(CHAT) + DONE],
    "failed": [*CHAT[:2], b'data: {"error": {"message": "no", "code": 500}}\n\n', DONE],
    "messages": [event("message_start", message={"id": "msg_1"}), event("message_stop")],
    "responses": [event("response.created", response={"id": "resp_1"}), event("response.completed", response=ENDED)],
    "nothing": [DONE],
}


class App:
    """An application that answers as vLLM does; what is asked for is in the path.

    Attributes:
        asks: whether requests want the field.
        value: of the field.
        log: what happened in its order.
    """

    def __init__(self) -> None:
        self.asks, self.value, self.log = True, json.dumps(VALUE).encode(), list[Any]()
        self.app = app = fastapi.FastAPI()
        app.post("/v1/chat/completions")(self.chat)
        app.get("/stream/{name}")(self.stream)
        app.get("/whole/{code}")(self.whole)
        app.get("/text")(lambda: self.begin() or fastapi.responses.PlainTextResponse("{}"))

    def begin(self) -> None:
        """A request reaches the engine."""
        found = http_request.current()
        assert found is not None
        assert found.reply is not None
        if self.asks:
            found.reply.field = self.tell

    async def tell(self) -> bytes | None:
        self.log.append("asked")
        await asyncio.sleep(0)
        return self.value

    async def chat(self, request: fastapi.Request) -> Any:
        asked = await request.json()
        if not asked.get("stream"):
            return self.whole(200)
        return self.stream("usage" if asked.get("stream_options") else "chat")

    def stream(self, name: str) -> Any:
        async def body() -> AsyncIterator[bytes]:
            self.begin()  # as in vLLM, which has sent the status by then
            for number, part in enumerate(STREAMS[name]):
                self.log.append(number)
                yield part

        return fastapi.responses.StreamingResponse(body(), media_type="text/event-stream")

    def whole(self, code: int) -> Any:
        self.begin()
        return fastapi.responses.JSONResponse(WHOLE, code, {"x-other": "kept"})

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://app")

    def get(self, path: str) -> httpx.Response:
        async def ask() -> httpx.Response:
            async with self.client() as client:
                return await client.get(path)

        return asyncio.run(ask())

    def openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url="http://app/v1", api_key="none", http_client=self.client())


@pytest.fixture
def app() -> Iterator[App]:
    undo = note_requests()
    yield App()
    undo()


def streamed(answer: httpx.Response, name: str) -> list[bytes]:
    """Events of an answer; those that the application sent itself are in it as they were, and in order."""
    events = [part + b"\n\n" for part in answer.content.split(b"\n\n")[:-1]]
    sent = [part + b"\n\n" for part in b"".join(STREAMS[name]).split(b"\n\n")[:-1]]
    added = [one for one in events if one not in sent]
    assert len(added) <= 1
    return [*added, *(one for one in events if one in sent)]


class TestWhole:
    def test_it_gets_a_member(self, app: App) -> None:
        """Every byte before it is as it was, and the length is right."""
        plain = json.dumps(WHOLE, ensure_ascii=False, separators=(",", ":")).encode()
        answer = app.get("/whole/200")
        assert plain[:-1] + b',"glassbox":' + app.value + b"}" == answer.content
        assert str(len(answer.content)) == answer.headers["content-length"]
        assert "kept" == answer.headers["x-other"]

    def test_without_asking_it_is_as_it_was(self, app: App) -> None:
        """Byte for byte, and nobody is asked for anything."""
        app.asks = False
        assert WHOLE == app.get("/whole/200").json()
        assert [] == app.log

    @pytest.mark.parametrize("path", ["/whole/400", "/whole/500", "/text"])
    def test_errors_and_other_answers_are_as_they_were(self, app: App, path: str) -> None:
        """What is no good answer in JSON has no place for it."""
        assert b"glassbox" not in app.get(path).content
        assert [] == app.log

    def test_nothing_to_say(self, app: App) -> None:
        """The answer is as it was."""
        app.value = None  # type: ignore[assignment]
        assert WHOLE == app.get("/whole/200").json()

    def test_whoever_tells_it_fails(self, app: App) -> None:
        """The answer is as it was."""

        async def tell() -> bytes | None:
            raise OSError("no disk")

        app.tell = tell  # type: ignore[method-assign]
        assert WHOLE == app.get("/whole/200").json()
        assert b"".join(STREAMS["chat"]) == app.get("/stream/chat").content

    @pytest.mark.parametrize(
        ("text", "wanted"), [(b"{}", b'{"f":1}'), (b' {"a":2}\n', b'{"a":2,"f":1}'), (b"[1]", b"[1]"), (b"", b"")]
    )
    def test_members(self, text: bytes, wanted: bytes) -> None:
        """An object gets one more; what is no object stays as it is."""
        assert wanted == with_member(text, "f", b"1")


class TestStreams:
    @pytest.mark.parametrize("name", ["chat", "at once"])
    def test_a_chunk_before_the_last(self, app: App, name: str) -> None:
        """Of the usage chunk's form: without choices, of the stream's own id; all others are as they were."""
        answer = app.get(f"/stream/{name}")
        added, *others = streamed(answer, name)
        assert [*CHAT[:1], *CHAT[1:], DONE] == others or b"".join(others) == b"".join(STREAMS[name])
        assert {**HEAD, "choices": [], "glassbox": VALUE} == json.loads(added.removeprefix(b"data: "))
        assert answer.content.endswith(added + DONE)

    def test_in_the_usage_chunk(self, app: App) -> None:
        """If there is one: no further chunk follows it."""
        answer = app.get("/stream/usage")
        usage = chunk(choices=[], usage=USAGE)
        wanted = usage[:-3] + b',"glassbox":' + app.value + b"}\n\n"
        assert b"".join([*CHAT, wanted, DONE]) == answer.content

    def test_nothing_waits_but_the_end(self, app: App) -> None:
        """It is asked for when all chunks are out: no token comes later for it."""
        app.get("/stream/chat")
        assert [0, 1, 2, 3, "asked"] == app.log

    @pytest.mark.parametrize("name", ["failed", "nothing"])
    def test_a_stream_that_fails_is_as_it_was(self, app: App, name: str) -> None:
        """Also one that never began."""
        assert b"".join(STREAMS[name]) == app.get(f"/stream/{name}").content
        assert "asked" not in app.log

    @pytest.mark.parametrize("name", sorted(STREAMS))
    def test_without_asking_it_is_as_it_was(self, app: App, name: str) -> None:
        """Byte for byte."""
        app.asks = False
        assert b"".join(STREAMS[name]) == app.get(f"/stream/{name}").content

    def test_messages(self, app: App) -> None:
        """In the event that ends them."""
        content = app.get("/stream/messages").content
        assert content.startswith(STREAMS["messages"][0] + b"event: message_stop\ndata: ")
        assert {"type": "message_stop", "glassbox": VALUE} == json.loads(content.rpartition(b"data: ")[2])

    def test_responses(self, app: App) -> None:
        """In the response that the last event holds, as in a whole one."""
        content = app.get("/stream/responses").content
        assert content.startswith(STREAMS["responses"][0] + b"event: response.completed\ndata: ")
        assert {**ENDED, "glassbox": VALUE} == json.loads(content.rpartition(b"data: ")[2])["response"]


class TestOpenaiClient:
    async def text_of(self, app: App, **options: Any) -> tuple[str, list[Any]]:
        client = app.openai()
        stream = await client.chat.completions.create(model="m", messages=[], stream=True, **options)
        chunks = [one async for one in stream]
        return "".join(one.choices[0].delta.content or "" for one in chunks if one.choices), chunks

    def test_whole(self, app: App) -> None:
        """An attribute of the completion."""

        async def ask() -> Any:
            return await app.openai().chat.completions.create(model="m", messages=[])

        answer = asyncio.run(ask())
        assert VALUE == answer.glassbox
        assert TEXT == answer.choices[0].message.content

    @pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": True}}])
    def test_streamed(self, app: App, options: Any) -> None:
        """An attribute of the last chunk, which has the usage, too, if that was asked for."""
        text, chunks = asyncio.run(self.text_of(app, **options))
        assert TEXT == text
        assert VALUE == chunks[-1].glassbox
        assert [] == chunks[-1].choices
        assert bool(options) == (chunks[-1].usage is not None)

    def test_its_own_reader_of_streams(self, app: App) -> None:
        """`chat.completions.stream` puts the same message together."""

        async def ask() -> Any:
            async with app.openai().chat.completions.stream(model="m", messages=[]) as stream:
                return [one async for one in stream], await stream.get_final_completion()

        events, whole = asyncio.run(ask())
        assert TEXT == whole.choices[0].message.content
        assert "stop" == whole.choices[0].finish_reason
        assert VALUE == next(one.chunk.glassbox for one in reversed(events) if one.type == "chunk")


class TestReply:
    def test_it_costs_other_requests_nothing(self) -> None:
        """What sends a message is the server's own, called once."""
        sent = []

        async def send(message: Any) -> None:
            sent.append(message)

        reply, messages = (
            Reply(send, "f"),
            [{"type": "http.response.start", "status": 200}, {"type": "http.response.body"}],
        )
        for message in messages:
            waiting: Any = reply(message)
            assert send.__name__ == waiting.cr_code.co_name
            asyncio.run(waiting)
        assert messages == sent
