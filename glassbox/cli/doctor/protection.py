"""Who gets in: each port that shows traces or numbers is tried without a key, and with the one that was given."""

import ipaddress
from collections.abc import Iterator
from typing import Final
from urllib.parse import urlsplit

from glassbox.cli.doctor.finding import Finding, error, ok, unknown, warning
from glassbox.cli.doctor.local_servers import listening_addresses
from glassbox.cli.doctor.question import Question, is_local, port_of
from glassbox.cli.doctor.reading import Answer, get

# The page alone has no data; what it shows comes from these.
_ROUTES: Final = ("/glassbox/v1/requests", "/glassbox/v1/snapshot", "/glassbox/v1/stream")
# Of vLLM, behind its --api-key.
_GUARDED: Final = "/v1/models"
_OWN_PORT: Final = "door.own_port"
_TIMEOUT_S: Final = 5.0
_SECURITY: Final = "docs/security.md"


def vllm_port(question: Question) -> Iterator[Finding]:
    """What the server's port shows to somebody without its key."""
    # One that does not answer at all is told by server.reachable.
    if question.url is not None and question.page.answer.status is not None:
        is_own = question.page.own and not question.page.vllm
        yield from _port(_OWN_PORT if is_own else "door.vllm", question.url, question)


def own_port(question: Question) -> Iterator[Finding]:
    """The same of glassbox's own port, if the YAML names one."""
    url = question.own_url
    if url is None or (question.url is None and question.server is None) or url == question.url:
        return
    yield from _port(_OWN_PORT, url, question)


def _port(name: str, url: str, question: Question) -> Iterator[Finding]:
    answers = {path: _try(url + path) for path in (*_ROUTES, _GUARDED)}
    guarded = answers.pop(_GUARDED).status in {401, 403}
    first = answers[_ROUTES[0]]
    if all(answer.status is None for answer in answers.values()):
        remedy = "does the server run there? See run.errors (stage http) and the server's log"
        yield error(name, f"{url} does not answer: {first.why}", remedy)
        return
    open_paths = [path for path, answer in answers.items() if answer.status == 200]
    beyond = _reached_from(url)
    if open_paths:
        yield from _open(name, url, open_paths, guarded, beyond, question)
    elif all(answer.status == 404 for answer in answers.values()):
        yield ok(name, f"{url} has no routes of glassbox")
    elif any(answer.status in {401, 403} for answer in answers.values()):
        yield ok(name, f"{url} shows nothing of glassbox without a key")
        yield from _with_key(name, url, question)
    else:
        statuses = ", ".join(str(answer.status) for answer in answers.values())
        yield unknown(name, f"{url} answers HTTP {statuses}")


def _open(
    name: str, url: str, paths: list[str], guarded: bool, beyond: str | None, question: Question
) -> Iterator[Finding]:
    seen = f"{url} shows {', '.join(paths)} without a key"
    config = question.valid_config
    if config is not None and config.requests.include_text and beyond is not None:
        remedy = f"requests.include_text: false, or a key ({_SECURITY})"
        yield error("door.text", f"{seen}, texts of requests included, {beyond}", remedy)
    if guarded:
        yield error(
            name, f"{seen}, though vLLM asks for one at {_GUARDED}", f"{_SECURITY} says how it follows vLLM's key"
        )
    elif beyond is not None:
        yield warning(name, f"{seen}, {beyond}", f"vllm serve --api-key, or a network that only you reach: {_SECURITY}")
    else:
        yield ok(name, f"{seen}; it can be reached from this machine alone")


def _with_key(name: str, url: str, question: Question) -> Iterator[Finding]:
    if question.api_key is None:
        return
    answer = _try(url + _ROUTES[0], question.api_key)
    seen = f"{url}{_ROUTES[0]} answers HTTP {answer.status} with the given key"
    if answer.status == 200:
        yield ok(f"{name}_key", f"{url} takes the given key")
    elif name == _OWN_PORT:
        yield unknown(
            f"{name}_key", f"{seen}; it may have another than vLLM's", "ask it alone: --url, and its own token"
        )
    else:
        yield error(f"{name}_key", seen, "give the key of the server (--api-key, GLASSBOX_API_KEY)")


def _reached_from(url: str) -> str | None:
    """Who can reach a port, in words; None if only this machine can."""
    if not is_local(urlsplit(url).hostname or ""):
        return "to whoever reaches that address"
    wide = [address for address in listening_addresses(port_of(url)) if not ipaddress.ip_address(address).is_loopback]
    return f"on {', '.join(wide)}" if wide else None


def _try(url: str, key: str | None = None) -> Answer:
    return get(url, key, timeout_s=_TIMEOUT_S, max_bytes=0)
