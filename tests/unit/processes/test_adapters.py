"""Which slot the rows of a request's LoRA adapter have: the first adapters their own, the others one together."""

import pytest

from glassbox.core.adapter_slots import MAX_NAME
from glassbox.core.rows import ROW_ADAPTER_SHIFT
from glassbox.processes.worker.adapters import AdapterSlots
from tests.trace_samples import new_request, scheduled_step


def arrive(slots: AdapterSlots, finished: set[str] | None = None, **adapters: str | None) -> None:
    """Requests by id, with their adapters; those that have finished are gone before."""
    new = [new_request(req_id, 3, adapter=adapter) for req_id, adapter in adapters.items()]
    step = scheduled_step(new, dict.fromkeys(adapters, 3), finished_req_ids=finished or set())
    slots.begin_step(step)


def slots_of(slots: AdapterSlots, *req_ids: str) -> list[int]:
    bits = slots.bits(req_ids)
    return [0] * len(req_ids) if bits is None else (bits >> ROW_ADAPTER_SHIFT).tolist()


class TestSlots:
    def test_the_first_adapters_have_their_own_and_the_others_share(self) -> None:
        """In the order in which they came; the base model is the first slot, the others the last."""
        slots = AdapterSlots(2)
        arrive(slots, a="poet", b=None, c="coder")
        arrive(slots, d="poet", e="third", f="fourth")
        assert slots_of(slots, "a", "b", "c", "d", "e", "f", "unknown") == [1, 0, 2, 1, 3, 3, 0]
        assert slots.names == ("poet", "coder")

    def test_a_slot_stays_when_its_requests_are_gone(self) -> None:
        """What is counted in it can't be taken out again."""
        slots = AdapterSlots(1)
        arrive(slots, a="poet")
        arrive(slots, finished={"a"}, b="coder")
        arrive(slots, finished={"b"}, c="poet")
        assert slots_of(slots, "a", "b", "c") == [0, 0, 1]

    def test_an_id_may_come_again_with_another_adapter(self) -> None:
        """In the output that tells of its end, and with none."""
        slots = AdapterSlots(2)
        arrive(slots, a="poet")
        arrive(slots, finished={"a"}, a="coder")
        assert slots_of(slots, "a") == [2]
        arrive(slots, a=None)
        assert slots_of(slots, "a") == [0]

    def test_a_preempted_request_keeps_its_adapter(self) -> None:
        """The V1 runner is told nothing new of it, the V2 runner all of it once more."""
        slots = AdapterSlots(1)
        arrive(slots, a="poet")
        arrive(slots)
        assert slots_of(slots, "a") == [1]
        arrive(slots, a="poet")
        assert slots_of(slots, "a") == [1]

    def test_off_it_looks_at_nothing(self) -> None:
        """No slot, and no request is followed."""
        slots = AdapterSlots(0)
        arrive(slots, a="poet")
        assert slots.bits(["a"]) is None
        assert slots.names == ()


class TestNames:
    def test_long_ones_are_cut(self) -> None:
        """A label must not grow without bound; what agrees so far is one."""
        slots = AdapterSlots(3)
        arrive(slots, a="x" * MAX_NAME + "1", b="x" * MAX_NAME + "2")
        assert slots.names == ("x" * MAX_NAME,)
        assert slots_of(slots, "a", "b") == [1, 1]

    def test_those_that_can_not_be_written_are_replaced(self) -> None:
        """Half a surrogate pair is no text in UTF-8."""
        slots = AdapterSlots(1)
        arrive(slots, a="po\ud800et")
        assert slots.names == ("po?et",)

    @pytest.mark.parametrize("name", ["base", "other"])
    def test_those_of_glassbox_are_no_adapters(self, name: str) -> None:
        """Such an adapter is one of the others, or two series would have the same labels."""
        slots = AdapterSlots(2)
        arrive(slots, a=name)
        assert slots.names == ()
        assert slots_of(slots, "a") == [3]

    def test_the_log_says_once_why_there_are_others(self, caplog: pytest.LogCaptureFixture) -> None:
        """For each reason, with the remedy."""
        slots = AdapterSlots(1)
        arrive(slots, a="poet", b="coder", c="third", d="base")
        arrive(slots, e="coder")
        # caplog hears a record from two loggers.
        first, second = (record.getMessage() for record in {id(record): record for record in caplog.records}.values())
        assert "'coder'" in first
        assert "adapters.max is 1 and so many came before; raise it and restart" in first
        assert "'base'" in second
        assert "load it under another one" in second
