"""How many layers and heads a model has, by the config.json of its folder."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from glassbox.view.input_file import open_file
from glassbox.view.measured import ViewError

_MAX_BYTES: Final = 64 << 20
# Layers times heads; no model has a hundredth of it, and a list of them is made.
_MAX_PLACES: Final = 10_000_000
_LAYERS: Final = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HEADS: Final = ("num_attention_heads", "n_head", "num_heads", "n_heads")
# Multimodal models keep the language model's settings in a section.
_SECTIONS: Final = ("text_config", "language_config", "llm_config", "thinker_config")
# Hybrid models name the kind of each layer; only attention is observed, Mamba and linear attention have no rows.
_KINDS: Final = ("layer_types", "layers_block_type")


@dataclass(frozen=True)
class ModelShape:
    """Attention layers and query heads.

    Attributes:
        total: layers of all kinds; indices of attention layers are below it.
    """

    layers: int
    heads: int
    total: int = field(default=0, compare=False)


def read_shape(path: Path) -> ModelShape:
    """Shape of the model in a folder (or of a config.json itself).

    Raises:
        ViewError: there is no such file, or it doesn't tell.
    """
    file = path / "config.json" if path.is_dir() else path
    remedy = "--model needs the folder of a model, else use --layers and --heads"
    with open_file(file, _MAX_BYTES, remedy) as opened:
        content = opened.read(_MAX_BYTES)
    try:
        config = json.loads(content)
        shape = _shape(config)
    except (ValueError, RecursionError) as error:
        raise ViewError(f"{file} is no JSON ({error}); use --layers and --heads") from None
    if shape is not None:
        return shape
    wanted = f"neither {' nor '.join((_LAYERS[0], _HEADS[0]))}"
    raise ViewError(f"{file} has {wanted}; use --layers and --heads")


def _shape(config: Any) -> ModelShape | None:
    for section in _sections(config):
        layers, heads = _number(section, _LAYERS), _number(section, _HEADS)
        if layers and heads and layers * heads <= _MAX_PLACES:
            return ModelShape(_attention_layers(section, layers), heads, layers)
    return None


def _sections(config: Any) -> list[dict[str, Any]]:
    """The configuration and the language model's sections in it, the innermost first."""
    if not isinstance(config, dict):
        return []
    return [inner for name in _SECTIONS for inner in _sections(config.get(name))] + [config]


def _number(config: dict[str, Any], names: tuple[str, ...]) -> int | None:
    """The first of the names that is there; of a list, one number a layer, the largest."""
    for name in names:
        value = config.get(name)
        numbers = value if isinstance(value, list) else [value]
        if numbers and all(type(number) is int and number > 0 for number in numbers):
            return max(numbers)
    return None


def _attention_layers(config: dict[str, Any], layers: int) -> int:
    for name in _KINDS:
        kinds = config.get(name)
        if isinstance(kinds, list) and len(kinds) == layers:
            return sum("attention" in str(kind) and "linear" not in str(kind) for kind in kinds) or layers
    pattern = config.get("hybrid_override_pattern")
    if isinstance(pattern, str) and len(pattern) == layers:
        return pattern.count("*") or layers
    return layers
