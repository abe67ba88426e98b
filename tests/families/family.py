"""What a row of the table of families says: a model, what is special in it, and what of it is to be observed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final


class Kind(StrEnum):
    """Kinds of attention, as docs/models.md names them."""

    CAUSAL = "causal"
    MULTI_QUERY = "one KV head for all"
    WINDOW = "sliding window"
    SOFT_CAP = "soft cap"
    ALIBI = "ALiBi"
    SINK = "learned sinks"
    SHARED = "keys of an earlier layer"
    HYBRID = "attention of hybrid models"
    TWO_SIZES = "K and V of two sizes"
    LATENT = "MLA (latent cache)"
    CHUNKED = "chunked local"
    PREFIX = "bidirectional prefix"
    ENCODER = "encoder"
    CROSS = "cross attention"


@dataclass(frozen=True)
class Unobserved:
    """Why layers are not observed.

    Attributes:
        slug: in the metric of bypassed layers.
        said: a part of what the log says.
    """

    slug: str
    said: str


@dataclass(frozen=True)
class _Observed:
    """They are."""


OBSERVED: Final = _Observed()
ENCODER: Final = Unobserved("encoder", "encoder")
CROSS: Final = Unobserved("cross", "cross attention")


@dataclass(frozen=True)
class Part:
    """Attention layers of one kind.

    Attributes:
        kind: of attention.
        layers: their global indices.
        expected: OBSERVED, or why not.
    """

    kind: Kind
    layers: Sequence[int]
    expected: _Observed | Unobserved = OBSERVED


class Truth(StrEnum):
    """Where the statistics come from that are the right ones."""

    TRANSFORMERS = "eager attention of transformers"
    QUERIES = "float64, from vLLM's own q and k"


# Query heads of every model whose settings don't say otherwise.
HEADS: Final = 4
# Both sides compute in float32, each in its own order; scores of some tens make the most of that. 5e-5 was seen.
ROUNDING: Final = 1e-4


class Task(StrEnum):
    """What a model is served for."""

    GENERATE = "text"
    EMBED = "vectors of the prompt's tokens"
    TRANSCRIBE = "text from audio"
    TRANSLATE = "text from text"


@dataclass(frozen=True)
class Family:
    """One tiny model.

    Attributes:
        name: in the documents.
        model_type: as transformers names its configuration.
        special: what it has that others don't, in a few words.
        parts: its attention layers, each in one of them.
        settings: of its configuration, beside those that all have.
        without: of those that all have, which are not its.
        serving: arguments of vLLM's engine.
        task: what it is served for.
        together: whether all prompts are served at once; not with vLLM's own q and k.
        truth: with what the statistics are compared.
        differs: why transformers can't be it, where it isn't.
        tolerance: largest deviation, relative above 1.
        unserved: a part of vLLM's error, where it can't serve the model on a CPU.
        fault: of glassbox, as long as it is not mended; the test fails until then.
        short: whether it is one of those that `make test` runs.
    """

    name: str
    model_type: str
    special: str = ""
    parts: Sequence[Part] = (Part(Kind.CAUSAL, (0, 1)),)
    settings: Mapping[str, Any] = field(default_factory=dict)
    without: Sequence[str] = ()
    serving: Mapping[str, Any] = field(default_factory=dict)
    task: Task = Task.GENERATE
    together: bool = True
    truth: Truth = Truth.TRANSFORMERS
    differs: str = ""
    tolerance: float = ROUNDING
    unserved: str = ""
    fault: str = ""
    short: bool = False

    @property
    def layers(self) -> list[int]:
        """Global indices of the attention layers that see the sequence's own tokens, in their order."""
        return sorted(layer for part in self.parts if part.kind is not Kind.CROSS for layer in part.layers)

    @property
    def observed(self) -> list[int]:
        """Of those that are to be observed."""
        return sorted(layer for part in self.parts if part.expected is OBSERVED for layer in part.layers)

    @property
    def heads(self) -> list[int]:
        """Query heads of each of these, by the model's configuration."""
        each = self.settings.get("num_attention_heads_per_layer")
        return [each[layer] if each else self.settings.get("num_attention_heads", HEADS) for layer in self.observed]

    @property
    def bypassed(self) -> dict[Unobserved, int]:
        """Number of layers that are not to be observed, by reason."""
        found: dict[Unobserved, int] = {}
        for part in self.parts:
            if isinstance(part.expected, Unobserved):
                found[part.expected] = found.get(part.expected, 0) + len(part.layers)
        return found
