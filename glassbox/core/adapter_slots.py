"""How the rows of LoRA adapters are told apart: a bounded number of slots, and what they are called.

Owns the order of the slots and the names that no adapter has for itself. Which adapter has which slot is a worker's:
`processes/worker/adapters.py`. Names are data from outside and may be anything.

The first slot is that of rows without an adapter, the following ones are those of the first adapters that the worker
has seen, and the last one is all others'.
"""

from typing import Final

# Labels of the first and the last slot. An adapter that is called so counts as one of the others.
BASE_MODEL: Final = "base"
OTHER_ADAPTERS: Final = "other"
# Characters of a name; adapters whose names agree so far share a slot.
MAX_NAME: Final = 128
# Largest number of adapters with a slot of their own: each takes as much device memory as all statistics without it.
MAX_ADAPTERS: Final = 64


def num_slots(limit: int) -> int:
    """Slots for so many adapters of their own: theirs, the base model's and the others'; 1 if none is told apart."""
    return limit + 2 if limit else 1


def is_reserved(name: str) -> bool:
    """Whether a slot is called so that is no adapter's."""
    return name in (BASE_MODEL, OTHER_ADAPTERS)
