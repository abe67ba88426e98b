"""What a request may ask of glassbox: the keys of `vllm_xargs`, their rules, and what an error says.

Owns the options' names and limits. It is pure (standard library only), so that the API server checks a request by the
very rules that the worker follows. Where options come from and what is done about a bad one belongs to those two.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from glassbox.core.signal_table import ON_REQUEST, SIGNAL_NAMES, signal_row

# Every limit bounds what one request can cost: memory of a row is at most
# layers x heads x (statistics + 2 top_k + spans) numbers, and MAX_ATTENTION_KEYS half-precision ones with its whole
# attention.
MAX_TOP_K: Final = 32
MAX_SPANS: Final = 16
MAX_ATTENTION_KEYS: Final = 8192
MAX_SPAN_NAME: Final = 64
# Token positions and indices are int32 in the records.
MAX_POSITION: Final = 2**31 - 1
MAX_INDEX: Final = 65_535
MAX_INDICES: Final = 1024

PREFIX: Final = "glassbox"
CHOICE_KEY: Final = "glassbox"
LAYERS_KEY: Final = "glassbox_layers"
HEADS_KEY: Final = "glassbox_heads"
TOP_K_KEY: Final = "glassbox_top_k"
SPANS_KEY: Final = "glassbox_spans"
ROWS_KEY: Final = "glassbox_rows"
PROMPT_KEY: Final = "glassbox_prompt"
SIGNALS_KEY: Final = "glassbox_signals"
RESPOND_KEY: Final = "glassbox_respond"
# Set by glassbox itself in the API server, never by a client: its trace context, the name by which it asked for the
# model, who it is (store/client_names.py), whether the trace rate has chosen its request, and of a request of a beam
# search how many tokens of its prompt are the client's.
TRACEPARENT_KEY: Final = "glassbox_traceparent"
MODEL_KEY: Final = "glassbox_model"
CLIENT_KEY: Final = "glassbox_client"
SAMPLED_KEY: Final = "glassbox_sampled"
BEAM_PROMPT_KEY: Final = "glassbox_beam_prompt"
_DETAIL_KEYS: Final = (
    LAYERS_KEY,
    HEADS_KEY,
    TOP_K_KEY,
    SPANS_KEY,
    ROWS_KEY,
    PROMPT_KEY,
    SIGNALS_KEY,
    RESPOND_KEY,
)
# Of these the ones that are added when a request is handed to the engine, after every check of what its client gave.
ADDED_KEYS: Final = (TRACEPARENT_KEY, CLIENT_KEY, SAMPLED_KEY)
CLIENT_KEYS: Final = (CHOICE_KEY, *_DETAIL_KEYS)

# Which rows of a prompt are measured: those that the sampler takes of each, all of them (none comes from the prefix
# cache), or all that are computed.
PromptRows = Literal["sampled", "all", "new"]

_SPAN: Final = re.compile(r"(?P<name>[^=]*)=(?P<start>[^:]*):(?P<end>.*)", re.DOTALL)
_SPAN_NAME: Final = re.compile(rf"[A-Za-z0-9_.-]{{1,{MAX_SPAN_NAME}}}")
_MESSAGE: Final = "message"
_INTEGER: Final = re.compile(r"[+-]?[0-9]{1,18}")
# W3C trace context, version 00: neither id may be all zeros.
_TRACEPARENT: Final = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
# Everybody who didn't say who it is.
ANONYMOUS: Final = "anonymous"
CLIENT_DIGITS: Final = 24
_CLIENT: Final = re.compile(rf"{ANONYMOUS}|[0-9a-f]{{{CLIENT_DIGITS}}}")
_SHOWN: Final = 80  # characters of a value that an error repeats


class OptionError(ValueError):
    """An option breaks its rule; the message says field, rule, value and remedy."""


@dataclass(frozen=True)
class Span:
    """A named range of token positions of a sequence; `end` is exclusive and may lie beyond the sequence."""

    name: str
    start: int
    end: int

    def __str__(self) -> str:
        return f"{self.name}={self.start}:{self.end}"


@dataclass(frozen=True)
class MessageSpan:
    """The tokens of one message of a chat, by index (negative counts from the last), not yet resolved."""

    name: str
    message: int

    def __str__(self) -> str:
        return f"{self.name}={_MESSAGE}:{self.message}"


@dataclass(frozen=True)
class TraceOptions:
    """What a traced request wants kept of each row beside its statistics.

    Attributes:
        layers, heads: global indices, ascending; None is all that are observed. Indices that the model lacks are
            left out.
        top_k: most attended positions per layer and head, and of their mean; 0 is none, at most MAX_TOP_K.
        spans: token ranges whose attention mass is wanted, at most MAX_SPANS, names distinct.
        attention: whether each row's whole attention is kept (to at most its latest MAX_ATTENTION_KEYS keys).
        prompt: which of the prompt's rows.
        signals: names in the table of signals, distinct. What they need of the trace is kept.
        respond: whether the response is to carry a summary.
    """

    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    top_k: int = 0
    spans: tuple[Span, ...] = ()
    attention: bool = False
    prompt: PromptRows = "sampled"
    signals: tuple[str, ...] = ()
    respond: bool = False

    @property
    def probes(self) -> bool:
        """True if the statistics of a row are not enough: its probabilities must be computed."""
        return bool(self.top_k or self.spans or self.attention)

    @property
    def arrays(self) -> frozenset[str]:
        """Which of the arrays that are kept on request alone are."""
        wanted = {name for signal in self.signals for name in signal_row(signal).arrays} & set(ON_REQUEST)
        # Who has queries and keys has the column sums, too: both are as long.
        return frozenset(wanted | {"received"} if self.prompt != "sampled" or "keys" in wanted else wanted)


@dataclass(frozen=True)
class ClientChoice:
    """What one request said.

    Attributes:
        choice: trace, off, or None if it said nothing.
        options: of a request that asked to be traced.
        message_spans: spans that the API server has to turn into token ranges.
        traceparent: W3C trace context of the request, None if there is none.
        model: by the name that the client asked for; None if it isn't known.
        client: who asked, as store/client_names.py names it; None if it isn't known.
        sampled: whether the API server has chosen it by the trace rate; None if it left that to the worker.
    """

    choice: Literal["trace", "off"] | None = None
    options: TraceOptions = field(default_factory=TraceOptions)
    message_spans: tuple[MessageSpan, ...] = ()
    traceparent: str | None = None
    model: str | None = None
    client: str | None = None
    sampled: bool | None = None


_NOTHING: Final = ClientChoice()


def traced_with(
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    spans: Iterable[Span | MessageSpan] = (),
    signals: Iterable[str] = (),
) -> dict[str, Any]:
    """The keys by which a request asks to be traced, as `parse_options` reads them. They are not checked here."""
    options: dict[str, Any] = {CHOICE_KEY: "trace"}
    if layers is not None:
        options[LAYERS_KEY] = list(layers)
    if heads is not None:
        options[HEADS_KEY] = list(heads)
    if places := [str(span) for span in spans]:
        options[SPANS_KEY] = places
    if names := list(signals):
        options[SIGNALS_KEY] = names
    return options


def parse_options(extra_args: Mapping[str, Any] | None, *, from_client: bool = False) -> ClientChoice:
    """Check a request's keys that start with `glassbox` and say what they mean.

    Args:
        extra_args: a client's `vllm_xargs`, in the worker the `extra_args` of the sampling parameters; other keys are
            not looked at. Values are str, int, float, bool or lists of them.
        from_client: True in the API server, before spans by message are resolved: these are allowed, and what glassbox
            sets itself (`ADDED_KEYS`) is not.

    Raises:
        OptionError: a key is unknown or breaks its rule.
    """
    given = {key: value for key, value in (extra_args or {}).items() if str(key).startswith(PREFIX)}
    if not given:
        return _NOTHING
    forbidden = next((key for key in ADDED_KEYS if from_client and key in given), None)
    if forbidden is not None:
        remedy = "send a traceparent header instead" if forbidden == TRACEPARENT_KEY else "remove it"
        raise OptionError(f"{forbidden} must not be given, got {_shown(given[forbidden])}; {remedy}")
    traceparent, client, sampled = (given.pop(key, None) for key in ADDED_KEYS)
    model = None if from_client else given.pop(MODEL_KEY, None)
    for key in given:
        if key not in CLIENT_KEYS:
            raise OptionError(f"{_shown(key)} must be one of {', '.join(CLIENT_KEYS)}; correct or remove it")
    choice = _parse_choice(given.get(CHOICE_KEY))
    details = [key for key in _DETAIL_KEYS if key in given]
    if details and choice != "trace":
        raise OptionError(
            f'{details[0]} must come with "{CHOICE_KEY}": "trace", got {_shown(given.get(CHOICE_KEY))}; '
            f"add that, or remove {details[0]}"
        )
    spans, message_spans = _parse_spans(given.get(SPANS_KEY), from_client)
    signals = parse_signals(SIGNALS_KEY, given.get(SIGNALS_KEY))
    return ClientChoice(
        choice=choice,
        options=TraceOptions(
            layers=_parse_indices(LAYERS_KEY, given.get(LAYERS_KEY)),
            heads=_parse_indices(HEADS_KEY, given.get(HEADS_KEY)),
            top_k=_parse_top_k(given.get(TOP_K_KEY)),
            spans=spans,
            attention=_parse_flag(ROWS_KEY, given.get(ROWS_KEY)),
            prompt=_parse_prompt(given.get(PROMPT_KEY), signals),
            signals=signals,
            respond=_parse_flag(RESPOND_KEY, given.get(RESPOND_KEY)),
        ),
        message_spans=message_spans,
        traceparent=traceparent if isinstance(traceparent, str) and _TRACEPARENT.fullmatch(traceparent) else None,
        model=model if isinstance(model, str) else None,
        client=client if isinstance(client, str) and _CLIENT.fullmatch(client) else None,
        sampled=sampled if isinstance(sampled, bool) else None,
    )


def _parse_choice(value: object) -> Literal["trace", "off"] | None:
    if value is None:
        return None
    if value == "trace":
        return "trace"
    if value == "off":
        return "off"
    raise OptionError(f"{CHOICE_KEY} must be trace or off, got {_shown(value)}; leave it out for neither")


def _parse_indices(key: str, value: object) -> tuple[int, ...] | None:
    if value is None or value == "all":
        return None
    rule = f"{key} must be all or a list of 1 to {MAX_INDICES} different whole numbers from 0 to {MAX_INDEX}"
    items = list(value) if isinstance(value, list | tuple) else [value]
    if not items:
        raise OptionError(f"{rule}, got an empty list; leave it out for all")
    if len(items) > MAX_INDICES:
        raise OptionError(f"{rule}, got {len(items)}; leave it out for all")
    indices = [_whole(item) for item in items]
    found = [index for index in indices if index is not None and 0 <= index <= MAX_INDEX]
    if len(found) < len(items):
        wrong = next(
            item for item, index in zip(items, indices, strict=True) if index is None or not 0 <= index <= MAX_INDEX
        )
        raise OptionError(f"{rule}, got {_shown(wrong)}; use a list such as [0, 5, 11]")
    if len(set(found)) < len(found):
        raise OptionError(f"{rule}, got {_shown(value)}; delete the repeated one")
    return tuple(sorted(found))


def _parse_top_k(value: object) -> int:
    if value is None:
        return 0
    number = _whole(value)
    if number is None or not 0 <= number <= MAX_TOP_K:
        raise OptionError(
            f"{TOP_K_KEY} must be a whole number from 0 to {MAX_TOP_K}, got {_shown(value)}; use 8, or 0 for none"
        )
    return number


def _parse_flag(key: str, value: object) -> bool:
    if value is None:
        return False
    text = value.lower() if isinstance(value, str) else value
    if isinstance(text, str | int | float) and text in {1, "1", "true"}:
        return True
    if isinstance(text, str | int | float) and text in {0, "0", "false"}:
        return False
    raise OptionError(f"{key} must be true or false, got {_shown(value)}; use 1 or 0")


def _parse_prompt(value: object, signals: tuple[str, ...]) -> PromptRows:
    if value == "all":
        return "all"
    if value == "new":
        return "new"
    if value is not None:
        raise OptionError(
            f"{PROMPT_KEY} must be all or new, got {_shown(value)}; leave it out for the rows that the sampler takes"
        )
    return "all" if any(signal_row(signal).prompt for signal in signals) else "sampled"


def parse_signals(key: str, value: object) -> tuple[str, ...]:
    """Names of signals, as a client or the YAML file lists them.

    Raises:
        OptionError: one is unknown or repeated.
    """
    if value is None:
        return ()
    items = list(value) if isinstance(value, list | tuple) else [value]
    names = tuple(item for item in items if isinstance(item, str) and item in SIGNAL_NAMES)
    if len(names) < len(items):
        wrong = next(item for item in items if item not in names)
        raise OptionError(
            f"{key} must list names of {', '.join(SIGNAL_NAMES)}, got {_shown(wrong)}; correct or remove it"
        )
    if len(set(names)) < len(names):
        raise OptionError(f"{key} must list different names, got {_shown(value)}; delete the repeated one")
    return names


def _parse_spans(value: object, from_client: bool) -> tuple[tuple[Span, ...], tuple[MessageSpan, ...]]:
    if value is None:
        return (), ()
    items = list(value) if isinstance(value, list | tuple) else [value]
    if len(items) > MAX_SPANS:
        raise OptionError(f"{SPANS_KEY} must list at most {MAX_SPANS} spans, got {len(items)}; ask for fewer")
    parsed = [_parse_span(item, from_client) for item in items]
    names = [span.name for span in parsed]
    repeated = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if repeated is not None:
        raise OptionError(f"{SPANS_KEY} must have different names, got {_shown(repeated)} twice; rename one")
    return (
        tuple(span for span in parsed if isinstance(span, Span)),
        tuple(span for span in parsed if isinstance(span, MessageSpan)),
    )


def _parse_span(item: object, from_client: bool) -> Span | MessageSpan:
    form = f"{SPANS_KEY} must be name=start:end" + (" or name=message:index" if from_client else "")
    match = _SPAN.fullmatch(item) if isinstance(item, str) else None
    if match is None:
        raise OptionError(f"{form}, got {_shown(item)}; write such as system=0:25")
    name = match["name"]
    if not _SPAN_NAME.fullmatch(name):
        raise OptionError(
            f"{SPANS_KEY} must have names of 1 to {MAX_SPAN_NAME} letters, digits, _ . or -, got {_shown(name)}; "
            f"write such as system=0:25"
        )
    end = _whole(match["end"])
    if match["start"] == _MESSAGE:
        if not from_client:
            raise OptionError(f"{form}, got {_shown(item)}; only chats have messages, give token positions instead")
        if end is None or abs(end) > MAX_INDEX:
            raise OptionError(f"{form}, the index a whole number, got {_shown(item)}; write such as user=message:-1")
        return MessageSpan(name, end)
    start = _whole(match["start"])
    if start is None or end is None:
        raise OptionError(f"{form}, start and end whole numbers, got {_shown(item)}; write such as system=0:25")
    if not 0 <= start < end <= MAX_POSITION:
        raise OptionError(
            f"{SPANS_KEY} must have 0 <= start < end <= {MAX_POSITION}, got {_shown(item)}; the end is exclusive"
        )
    return Span(name, start, end)


def _whole(value: object) -> int | None:
    """The whole number that `value` is or spells; None if it is none. Clients in JavaScript send 3 as 3.0 at times."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str) and _INTEGER.fullmatch(value):
        return int(value)
    return None


def _shown(value: object) -> str:
    """`value` as an error shows it: a client may send megabytes, and this goes into its log."""
    text = repr(value[:_SHOWN] if isinstance(value, str | list | tuple) else value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
