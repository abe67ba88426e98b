"""How much of a GPU's memory the numbers of whole prompts may take, beside a server that means to have all of it.

Owns that bound and how it is told. vLLM fills the GPU up to `--gpu-memory-utilization` and does not ask before it takes
what a larger batch needs, so what is taken here must leave it that: a server that runs out of memory ends.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

import torch

# Never taken: vLLM itself allows 150 MiB for what it can't foresee, torch takes up to 20 MiB more than it is asked for,
# and programs and workspaces of libraries that are used for the first time come from the driver.
MARGIN_BYTES: Final = 256 << 20
# Answers that wait on the device to be copied, however much is free.
_WAITING_BYTES: Final = 1 << 30
# What a client or an operator can do about too little of it.
REMEDY: Final = (
    "Ask for fewer layers or heads, or for fewer prompts at once, or start vLLM with a smaller "
    "--gpu-memory-utilization or --max-num-batched-tokens"
)


class UnmeasuredPromptError(RuntimeError):
    """Rows of a prompt that were asked for were not measured."""


class FreeBytes(NamedTuple):
    """Of a GPU.

    Attributes:
        driver: that nobody has taken.
        pooled: that torch has taken in this process, and nobody uses.
    """

    driver: int
    pooled: int


def free_bytes(device: torch.device) -> FreeBytes:
    """As they are now. Does not wait for the device; of one that is no GPU as much as can be counted."""
    if device.type != "cuda":
        return FreeBytes(2**63, 0)
    driver, _ = torch.cuda.mem_get_info(device)
    return FreeBytes(driver, torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


class PromptMemory:
    """What the prompts of a step may take.

    Args:
        activation_bytes: that a forward pass of vLLM takes at most beside weights and KV cache; 0 if it isn't known.
        ask: returns what is free; called once in a step that has prompts, for it takes as long as a launch.
    """

    def __init__(self, activation_bytes: int, ask: Callable[[], FreeBytes]) -> None:
        self._activation_bytes, self._ask = activation_bytes, ask
        # What may be taken in this step: None before it was asked.
        self._room: int | None = None
        self._most_held = 0
        # Of what torch has pooled, the memory of CUDA graphs, which nothing else gets.
        self._of_graphs = 0

    def end_warm_up(self) -> None:
        """Graphs are captured. What else torch has pooled by now counts as theirs, so that rather less is free."""
        self._of_graphs = self._ask().pooled

    def begin(self) -> None:
        """A step begins."""
        self._room = None

    def held(self, nbytes: int) -> None:
        """So much is held by prompts, of this step and of those whose answers wait."""
        self._most_held = max(self._most_held, nbytes)

    def left(self, needed: int, *, found: int, waiting: int) -> int:
        """Bytes that are left when so many more are taken.

        Args:
            needed: for a prompt in one layer, to compute it and to keep its answers.
            found: held by answers of this step; waiting: by those of earlier ones, which are being copied.

        Raises:
            UnmeasuredPromptError: they must not be taken.
        """
        if waiting + found > _WAITING_BYTES:
            raise UnmeasuredPromptError(
                f"{_WAITING_BYTES >> 20} MiB of whole prompts' numbers wait to be copied from the GPU; ask for fewer "
                "layers or heads, or for fewer prompts at once"
            )
        if self._room is None:
            self._room = self._free()
        left = self._room - found - needed
        if left < 0:
            raise UnmeasuredPromptError(
                f"a whole prompt's numbers take {mib(needed)} MiB in a layer, and of the GPU's memory "
                f"{mib(max(self._room - found, 0))} MiB are left for them: {MARGIN_BYTES >> 20} MiB and what a batch "
                f"of vLLM's may take are never touched. {REMEDY}"
            )
        return left

    def _free(self) -> int:
        free = self._ask()
        pooled = max(free.pooled - self._of_graphs, 0)
        # Memory that was given back stays with torch, for whoever comes first.
        own = min(pooled, self._most_held)
        of_vllm = max(self._activation_bytes - (pooled - own), 0)
        return free.driver + own - of_vllm - MARGIN_BYTES


def out_of_memory(needed: int, error: torch.OutOfMemoryError) -> UnmeasuredPromptError:
    """What is told of memory that seemed to be free, and was not when it was taken."""
    first = next(iter(str(error).splitlines()), "")
    return UnmeasuredPromptError(
        f"a whole prompt's numbers take {mib(needed)} MiB in a layer, which the GPU had not got when they were asked "
        f"for ({first}). {REMEDY}"
    )


def mib(nbytes: int) -> int:
    """Rounded up."""
    return -(-nbytes >> 20)
