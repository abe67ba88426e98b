"""The demo's traffic: real requests of the kinds a server sees, as the OpenAI API takes them.

Owns what is asked. Short and long, chat and plain completion, streamed, several at once, and a prompt of more
than 1,500 tokens; greedy, so that two runs ask for the same.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import httpx
from httpx_sse import EventSource

LONG_PROMPT_TOKENS: Final = 1500
_TIMEOUT_S: Final = 180.0
_CHAT: Final = "/v1/chat/completions"
_COMPLETION: Final = "/v1/completions"


class TrafficError(RuntimeError):
    """A request failed or came back in another form than the API promises."""


@dataclass(frozen=True)
class Request:
    """One request: its name in the progress display, where it goes, and its body (without `model`)."""

    name: str
    path: str
    body: dict[str, Any]
    min_prompt_tokens: int = 1


@dataclass(frozen=True)
class Answer:
    """What came back: text, tokens of prompt and answer as the server counted them, and seconds it took."""

    request: Request
    text: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float


def _chat(name: str, question: str, max_tokens: int, *, stream: bool = False, minimum: int = 1) -> Request:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": question}], "max_tokens": max_tokens}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return Request(name, _CHAT, {**body, "temperature": 0}, minimum)


def _completion(name: str, prompt: str, max_tokens: int) -> Request:
    return Request(name, _COMPLETION, {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0})


def _logbook(lines: int) -> str:
    """A harbour log, one varied line per ship: long text that isn't the same words again and again."""
    ships = ("Aurora", "Brigid", "Cormorant", "Dunlin", "Estrella", "Fulmar", "Gannet")
    cargoes = ("timber", "grain", "engine parts", "citrus fruit", "salt", "wool", "roof slates", "tea")
    berths = ("north pier", "fish quay", "outer mole", "dry dock", "coal wharf")
    winds = (
        "calm",
        "light from the west",
        "fresh from the north",
        "gusty",
        "steady from the south",
        "none at all",
    )
    entries = []
    for i in range(lines):
        hour, minute = divmod(17 * i + 23, 60)
        entries.append(
            f"{hour % 24:02d}:{minute:02d} The {ships[i % 7]} berths at the {berths[i % 5]} "
            f"with {40 + 13 * i % 97} tons of {cargoes[i % 8]}; wind {winds[i % 6]}."
        )
    return "\n".join(entries)


def demo_traffic() -> list[list[Request]]:
    """Batches of requests; those of one batch are sent at the same time."""
    topics = ("a lighthouse", "a bread recipe", "the moon", "a bicycle", "how rivers form", "a chess opening")
    question = f"This is a harbour log:\n{_logbook(54)}\nWhich ships brought timber? Answer in one sentence."
    return [
        [_chat("short chat", "What is the capital of France?", 24)],
        [_completion("short completion", "Once upon a time, a small fox", 48)],
        [
            _chat(
                "long answer, streamed",
                "Explain step by step how a sailing boat moves against the wind.",
                96,
                stream=True,
            )
        ],
        [
            _chat(f"chat {i + 1} of {len(topics)} at once", f"Write three sentences about {topic}.", 48)
            for i, topic in enumerate(topics)
        ],
        [
            _chat("long prompt", question, 48, minimum=LONG_PROMPT_TOKENS),
            _completion("completion beside it", "The three primary colours are", 48),
        ],
    ]


def send_traffic(
    url: str,
    model: str,
    batches: Sequence[Sequence[Request]],
    on_answer: Callable[[Answer], None] = lambda _: None,
) -> list[Answer]:
    """Send the batches one after the other.

    Args:
        url: of the server, without path.
        model: the name it serves.
        batches: as of `demo_traffic`.
        on_answer: called (in this thread) with each answer, in the order of the requests.

    Raises:
        TrafficError: a request failed, or its prompt was shorter than it says.
    """
    answers = []
    width = max((len(batch) for batch in batches), default=1)
    with httpx.Client(base_url=url, timeout=_TIMEOUT_S, trust_env=False) as client, ThreadPoolExecutor(width) as pool:
        for batch in batches:
            for answer in pool.map(lambda request: _send(client, model, request), batch):
                answers.append(answer)
                on_answer(answer)
    return answers


def _send(client: httpx.Client, model: str, request: Request) -> Answer:
    body = {"model": model, **request.body}
    begin = time.monotonic()
    try:
        if body.get("stream"):
            text, usage = _streamed(client, request.path, body)
        else:
            text, usage = _whole(client, request.path, body)
        answer = Answer(
            request,
            text,
            int(usage["prompt_tokens"]),
            int(usage["completion_tokens"]),
            time.monotonic() - begin,
        )
    except httpx.HTTPStatusError as error:
        raise TrafficError(f"{request.name}: HTTP {error.response.status_code}: {error.response.text}") from error
    except (httpx.HTTPError, KeyError, IndexError, TypeError, ValueError) as error:
        raise TrafficError(f"{request.name}: {type(error).__name__}: {error}") from error
    if answer.prompt_tokens < request.min_prompt_tokens:
        raise TrafficError(
            f"{request.name}: the prompt must have at least {request.min_prompt_tokens} tokens, "
            f"got {answer.prompt_tokens}"
        )
    return answer


def _whole(client: httpx.Client, path: str, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    reply = client.post(path, json=body).raise_for_status().json()
    return _text(reply["choices"][0], "message"), reply["usage"]


def _streamed(client: httpx.Client, path: str, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Server-sent events: `data: JSON` lines up to `data: [DONE]`; the last has the usage and no choice."""
    pieces: list[str] = []
    usage: dict[str, Any] = {}
    with client.stream("POST", path, json=body) as reply:
        if reply.is_error:
            reply.read()
        reply.raise_for_status()
        # Not `iter_lines`: it also splits at U+2028 and U+0085, which may stand in a generated text.
        for message in EventSource(reply).iter_sse():
            if message.data == "[DONE]":
                break
            event = message.json()
            pieces += [_text(choice, "delta") for choice in event["choices"]]
            usage = event.get("usage") or usage
    return "".join(pieces), usage


def _text(choice: dict[str, Any], part: str) -> str:
    return str(choice["text"] if "text" in choice else choice[part].get("content") or "")
