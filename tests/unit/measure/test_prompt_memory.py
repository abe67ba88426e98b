"""What whole prompts may take of a GPU's memory: never what vLLM may still want of it."""

import pytest
import torch

from glassbox.measure.prompt_memory import MARGIN_BYTES, FreeBytes, PromptMemory, UnmeasuredPromptError, out_of_memory

MIB = 1 << 20


class Gpu:
    """So much is free."""

    def __init__(self, driver: int, pooled: int = 0) -> None:
        self.driver, self.pooled, self.times_asked = driver, pooled, 0

    def __call__(self) -> FreeBytes:
        self.times_asked += 1
        return FreeBytes(self.driver, self.pooled)


def left(memory: PromptMemory, needed: int = 0, found: int = 0, waiting: int = 0) -> int:
    return memory.left(needed, found=found, waiting=waiting)


def test_a_margin_is_never_taken() -> None:
    memory = PromptMemory(0, Gpu(MARGIN_BYTES + 100 * MIB))
    assert 70 * MIB == left(memory, 10 * MIB, found=20 * MIB)
    assert 0 == left(memory, 80 * MIB, found=20 * MIB)
    with pytest.raises(
        UnmeasuredPromptError, match="81 MiB in a layer, and of the GPU's memory 80 MiB are left"
    ) as told:
        left(memory, 80 * MIB + 1, found=20 * MIB)
    assert "--gpu-memory-utilization" in str(told.value)
    assert "fewer layers or heads" in str(told.value)


def test_a_gpu_that_is_full() -> None:
    """Nothing is left, not less."""
    with pytest.raises(UnmeasuredPromptError, match=" 0 MiB are left"):
        left(PromptMemory(0, Gpu(MIB)), 1)


def test_it_is_asked_once_in_a_step_and_only_if_a_prompt_comes() -> None:
    gpu = Gpu(MARGIN_BYTES + 10 * MIB)
    memory = PromptMemory(0, gpu)
    memory.begin()
    assert 0 == gpu.times_asked
    left(memory)
    gpu.driver -= 5 * MIB  # taken by the step's own answers, which it is told
    assert 5 * MIB == left(memory, found=5 * MIB)
    assert 1 == gpu.times_asked
    memory.begin()
    assert 5 * MIB == left(memory)


def test_what_a_larger_batch_takes_is_left_to_vllm() -> None:
    """What torch has pooled of it already isn't the driver's any more; graphs' memory is nobody else's."""
    gpu = Gpu(MARGIN_BYTES + 1000 * MIB, pooled=70 * MIB)
    memory = PromptMemory(400 * MIB, gpu)
    memory.end_warm_up()
    assert 600 * MIB == left(memory)
    memory.begin()
    gpu.driver, gpu.pooled = MARGIN_BYTES + 700 * MIB, 370 * MIB
    assert 600 * MIB == left(memory)


def test_what_was_given_back_can_be_taken_again() -> None:
    """Torch keeps it; what others have of it meanwhile is not counted twice."""
    gpu = Gpu(MARGIN_BYTES + 100 * MIB)
    memory = PromptMemory(0, gpu)
    memory.held(60 * MIB)
    memory.held(30 * MIB)
    gpu.driver, gpu.pooled = MARGIN_BYTES + 40 * MIB, 500 * MIB
    assert 100 * MIB == left(memory)
    memory.begin()
    gpu.pooled = 20 * MIB
    assert 60 * MIB == left(memory)


def test_what_waits_is_bounded_however_much_is_free() -> None:
    memory = PromptMemory(0, Gpu(1 << 40))
    left(memory, found=512 * MIB, waiting=512 * MIB)
    with pytest.raises(UnmeasuredPromptError, match="1024 MiB of whole prompts' numbers wait to be copied"):
        left(memory, found=512 * MIB, waiting=512 * MIB + 1)


def test_memory_that_was_not_there() -> None:
    """Torch's own words, of which the first line says what was asked for."""
    told = str(out_of_memory(3 * MIB, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 MiB.\nmore")))
    assert "take 3 MiB in a layer" in told
    assert "(CUDA out of memory. Tried to allocate 3.00 MiB.)" in told
    assert "--gpu-memory-utilization" in told
