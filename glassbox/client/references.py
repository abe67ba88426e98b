"""Which request a response is of: an API's response, its last chunk, a dict, or an id.

Owns reading them. A response that carries a summary (`glassbox_respond`) names vLLM's own id of each choice, which no
other request has; of any other the id that its client got is known, and which trace is which choice's is told by vLLM's
ids of the traces that the server lists for it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from glassbox.client.failures import GlassboxClientError
from glassbox.store.trace_directory import prompt_number
from glassbox.store.trace_record import call_and_sample, external_id


@dataclass(frozen=True)
class Reference:
    """What is known of the request whose trace is wanted.

    Attributes:
        request_id: vLLM's own id or the client's.
        choice: which of the response's choices is meant.
        exact: whether the id is vLLM's own, of that choice alone.
    """

    request_id: str
    choice: int
    exact: bool = False


def reference_of(response: Any, choice: int = 0) -> Reference:
    """The request that a response is of.

    Args:
        response: of `openai`, `anthropic` or any other client: whatever has an `id`, or holds a `response` that has
            one; a dict of such; or the id itself.
        choice: index among the response's choices.

    Raises:
        GlassboxClientError: it has no id, or no such choice.
    """
    if isinstance(choice, bool) or not isinstance(choice, int) or choice < 0:
        raise GlassboxClientError(f"choice must be a whole number from 0 on, got {choice!r}; use 0 for the first")
    if isinstance(response, str):
        return _of_id(response, choice)
    found = response if _get(response, "id") is not None else _get(response, "response")
    summary = _get(response, "glassbox") or _get(found, "glassbox")
    choices = _get(summary, "choices")
    if isinstance(choices, list) and choices:
        if choice >= len(choices):
            raise GlassboxClientError(
                f"choice must be from 0 to {len(choices) - 1}, got {choice}; the response has no more"
            )
        internal_id = _get(choices[choice], "internal_id")
        if isinstance(internal_id, str):
            return Reference(internal_id, choice, exact=True)
    return _of_id(_get(found, "id"), choice)


def internal_id_of(document: Mapping[str, Any], wanted: Reference) -> str | None:
    """vLLM's own id of the trace that is wanted; None if the server lists none for that choice.

    Args:
        document: what the server answers for the client's id: the newest request's first trace, and the others.
    """
    first = str(document["internal_id"])
    if wanted.exact or (wanted.choice == 0 and first == wanted.request_id):
        return first
    internal_ids = [first, *(str(other["internal_id"]) for other in document.get("others", ()))]
    prompts = _newest(internal_ids, wanted.request_id)
    samples = max(len(of_prompt) for of_prompt in prompts.values())
    numbers, sample = divmod(wanted.choice, samples)
    of_prompt = prompts.get(sorted(prompts)[numbers], {}) if numbers < len(prompts) else {}
    return of_prompt.get(sample)


def _newest(internal_ids: Iterable[str], request_id: str) -> dict[int, dict[int, str]]:
    """Of the newest request of an id its traces by prompt and sample; the newest come first."""
    prompts: dict[int, dict[int, str]] = {}
    calls: dict[int, str] = {}
    for internal_id in internal_ids:
        external = external_id(internal_id)
        # A completion's prompts have the client's id and a number.
        number = prompt_number(external) if external != request_id else 0
        call, sample = call_and_sample(internal_id)
        if calls.setdefault(number, call) == call:
            prompts.setdefault(number, {})[max(sample, 0)] = internal_id
    return prompts


def _of_id(request_id: Any, choice: int) -> Reference:
    if not isinstance(request_id, str) or not request_id:
        raise GlassboxClientError(
            f"response must have an id, got {type(request_id).__name__}; give what the API's client returned, its last "
            "chunk, or the id as text"
        )
    return Reference(request_id, choice)


def _get(thing: Any, name: str) -> Any:
    return thing.get(name) if isinstance(thing, Mapping) else getattr(thing, name, None)
