"""Which layer of its model an attention module is: from where the module stands, not from what it is called.

Owns the numbering. vLLM's names of attention modules are keys of a dictionary: in some models their first number is the
layer, in others it counts the attention modules alone, and in models that run a layer several times it numbers the
passes. So the number is the module's place in the model's list of layers, as the model's own module tree has it.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any


def number_layers(model: Any, layers: Mapping[str, Any]) -> dict[str, int]:
    """Number the attention modules of a model, each by a number of its own.

    A model that has one module a layer numbers them as its layers. Modules that share a layer are told apart: as vLLM
    numbers them, if it gives each a number (passes of a layer that runs several times: layer + pass * layers), else by
    layer * most modules of a layer + place in it.

    Args:
        model: vLLM's, with `named_modules`; None if there is none to look at.
        layers: its attention modules by vLLM's name, in the order in which they were built.

    Raises:
        ValueError: a module stands in no list, and its name holds no number.
    """
    names = list(layers)
    named = [_first_number(name) for name in names]
    placed = _places(model, list(layers.values()))
    if None in placed:  # modules that the tree doesn't have
        placed = named
    if None in placed:
        nameless = next(name for name, number in zip(names, placed, strict=True) if number is None)
        raise ValueError(f"attention layer {nameless!r} has no index in its name")
    for numbers in (placed, named):
        if None not in numbers and len(set(numbers)) == len(numbers):
            return {name: int(number or 0) for name, number in zip(names, numbers, strict=True)}
    most = max(Counter(placed).values())
    seen: Counter[int | None] = Counter()
    numbered = {}
    for name, place in zip(names, placed, strict=True):
        numbered[name] = int(place or 0) * most + seen[place]
        seen[place] += 1
    return numbered


def _first_number(name: str) -> int | None:
    """Of a dotted name; of a module's path it is the module's place in the first list on the way to it."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _places(model: Any, modules: list[Any]) -> list[int | None]:
    """The place of each module in the model's list of layers; None if it is in none."""
    wanted = {id(module): n for n, module in enumerate(modules)}
    found: list[set[int]] = [set() for _ in modules]
    if model is not None:
        # A block that several layers share is met in each of them.
        for path, module in model.named_modules(remove_duplicate=False):
            n = wanted.get(id(module))
            place = _first_number(path) if n is not None else None
            if n is not None and place is not None:
                found[n].add(place)
    # Modules of a shared block: each layer that has the block uses one of them, in their order.
    sharing: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for n, places in enumerate(found):
        sharing[tuple(sorted(places))].append(n)
    placed: list[int | None] = [None] * len(modules)
    for of_block, users in sharing.items():
        for nth, n in enumerate(users):
            if len(of_block) == 1:
                placed[n] = of_block[0]
            elif len(of_block) == len(users):
                placed[n] = of_block[nth]
    return placed
