"""Chats for a baseline and for what is compared with it: the same kinds of task, about other subjects."""

from typing import Final

from glassbox.cli.demo.traffic import Request

_TASKS: Final = (
    "Explain {} in two sentences.",
    "Write three short facts about {}.",
    "What should a child know about {}?",
    "Give one common mistake people make about {}.",
    "Write a short poem about {}.",
    "Summarise what is known about {} for a newspaper.",
)
_OF_BASELINE: Final = (
    *("the tides", "a bread recipe", "an old clock", "how rivers form", "a chess opening", "winter tyres"),
    *("the moon", "a violin", "photosynthesis", "a lighthouse", "the printing press", "map projections"),
)
_OTHERS: Final = (
    *("coffee beans", "volcanoes", "the Silk Road", "a bicycle chain", "honey bees", "glass making"),
    *("the water cycle", "a sailing boat", "compound interest", "the human heart", "thunder", "paper"),
)
AT_ONCE: Final = 16
_TOKENS: Final = 40
NUMBER: Final = 32


def questions(*, held_out: bool, bare: bool = False) -> list[Request]:
    """32 requests, greedy, of at most 40 tokens.

    Args:
        held_out: about subjects that the baseline's requests don't have.
        bare: as plain completions, without chat template.
    """
    subjects = _OTHERS if held_out else _OF_BASELINE
    requests = []
    for i in range(NUMBER):
        subject = subjects[i % len(subjects)]
        # Shifted by one in each round, so that a subject meets another task.
        requests.append(ask(_TASKS[(i + i // len(subjects)) % len(_TASKS)].format(subject), bare=bare))
    return requests


def ask(text: str, *, bare: bool = False) -> Request:
    """One of them, with a text of one's own."""
    body = {"max_tokens": _TOKENS, "temperature": 0}
    if bare:
        return Request(text, "/v1/completions", {"prompt": text, **body})
    return Request(text, "/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **body})
