"""Orders for API servers and what rules did: small files that are believed no more than others."""

import json
from pathlib import Path

import pytest

from glassbox.store import acts, orders
from glassbox.store.acts import Act, Acts, acts_of, tags_of
from glassbox.store.orders import VALID_S, Order, OrderReader
from glassbox.store.trusted_file import DistrustError

NOW_S = 1_700_000_000.0


def make_order(number: int = 1, do: orders.Do = "abort", rule: str = "r", time_s: float = NOW_S) -> Order:
    return Order(f"cmpl-{number}-0-0123abcd", f"cmpl-{number}-0", do, rule, time_s)


NO_TIME = b'[{"rule": "r", "action": "log", "outcome": "done", "value": 1.0, "time_s": NaN}]'


class TestOrders:
    def test_each_is_read_once(self, tmp_path: Path) -> None:
        """By every API server; a request's orders of other kinds and rules are others."""
        given = [make_order(), make_order(do="tag"), make_order(rule="s"), make_order(2)]
        for order in given:
            orders.give(tmp_path, order)
        readers = [OrderReader(tmp_path) for _ in range(2)]
        for reader in readers:
            assert set(given) == set(reader.fresh(NOW_S))
            assert [] == list(reader.fresh(NOW_S))
        orders.give(tmp_path, make_order(3))
        assert [make_order(3)] == list(readers[0].fresh(NOW_S))

    def test_answers(self, tmp_path: Path) -> None:
        """They are told by the order's name until it is withdrawn."""
        orders.give(tmp_path, make_order())
        orders.give(tmp_path, make_order(2))
        orders.answer(tmp_path, make_order(), "done")
        orders.answer(tmp_path, make_order(2), "late")
        assert {make_order().name: "done", make_order(2).name: "late"} == orders.answers(tmp_path)
        orders.withdraw(tmp_path, make_order().name)
        assert {make_order(2).name: "late"} == orders.answers(tmp_path)
        orders.withdraw_all(tmp_path)
        assert [] == list((tmp_path / orders.FOLDER).iterdir())

    def test_an_old_one(self, tmp_path: Path) -> None:
        """What an exporter that died has left ends nobody's request."""
        orders.give(tmp_path, make_order(time_s=NOW_S - VALID_S - 1))
        assert [] == list(OrderReader(tmp_path).fresh(NOW_S))

    @pytest.mark.parametrize(
        "content",
        [b"", b"[]", b"{}", b'{"internal_id": 1}', b"[" * 100_000,
         json.dumps({**vars(make_order()), "do": "kill"}).encode(), json.dumps({**vars(make_order()), "x": 1}).encode(),
         json.dumps({**vars(make_order()), "internal_id": ["a"]}).encode(),
         json.dumps({**vars(make_order()), "time_s": "nan"}).encode(),
         json.dumps({**vars(make_order()), "time_s": 10**400}).encode()],
    )  # fmt: skip
    def test_garbage(self, tmp_path: Path, content: bytes) -> None:
        """It is no order, and an answer of that kind is a failure."""
        orders.give(tmp_path, make_order(2))
        (tmp_path / orders.FOLDER / "a.json").write_bytes(content)
        (tmp_path / orders.FOLDER / "a.done").write_bytes(content)
        assert [make_order(2)] == list(OrderReader(tmp_path).fresh(NOW_S))
        assert {"a": "failed"} == orders.answers(tmp_path)

    def test_a_folder_of_somebody_else(self, tmp_path: Path) -> None:
        """Whoever could write there could end any request."""
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / orders.FOLDER).symlink_to("elsewhere")
        with pytest.raises(DistrustError):
            list(OrderReader(tmp_path).fresh(NOW_S))
        with pytest.raises(DistrustError):
            orders.give(tmp_path, make_order())

    def test_a_file_that_others_may_write_to(self, tmp_path: Path) -> None:
        """Likewise."""
        orders.give(tmp_path, make_order())
        (tmp_path / orders.FOLDER / f"{make_order().name}.json").chmod(0o666)
        assert [] == list(OrderReader(tmp_path).fresh(NOW_S))


class TestActs:
    def test_of_one_request(self, tmp_path: Path) -> None:
        """In their order; of others nothing."""
        done = [Act("r", "tag", "done", 0.75, NOW_S), Act("r", "abort", "failed", None, NOW_S)]
        for act in done:
            Acts(tmp_path).note(("0", "cmpl-1", None), [act])
        assert done == acts_of(tmp_path, ("0", "cmpl-1", None))
        assert [] == acts_of(tmp_path, ("1", "cmpl-1", None))
        assert [] == acts_of(tmp_path, ("0", "cmpl-1", "0" * 24))
        assert ["r"] == tags_of(vars(act) for act in done)
        assert 0o600 == next((tmp_path / acts.FOLDER).iterdir()).stat().st_mode & 0o777

    def test_bounded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of a request the latest, of requests the latest."""
        monkeypatch.setattr(acts, "MAX_ACTS", 3)
        monkeypatch.setattr(acts, "MAX_FILES", 5)
        monkeypatch.setattr(acts, "PRUNE_EVERY", 2)
        writer = Acts(tmp_path)
        for number in range(10):
            writer.note(("0", "cmpl-1", None), [Act("r", "log", "done", float(number), NOW_S)])
        assert [7.0, 8.0, 9.0] == [act.value for act in acts_of(tmp_path, ("0", "cmpl-1", None))]
        for number in range(20):
            writer.note(("0", f"cmpl-{number}", None), [Act("r", "log", "done", 1.0, NOW_S)])
        assert len(list((tmp_path / acts.FOLDER).iterdir())) <= 5 + 1
        assert acts_of(tmp_path, ("0", "cmpl-19", None))

    @pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'[{"rule": 1}]', b"[" * 60_000, NO_TIME])
    def test_garbage(self, tmp_path: Path, content: bytes) -> None:
        """It says that nothing was done."""
        Acts(tmp_path).note(("0", "cmpl-1", None), [Act("r", "log", "done", 1.0, NOW_S)])
        next((tmp_path / acts.FOLDER).iterdir()).write_bytes(content)
        assert [] == acts_of(tmp_path, ("0", "cmpl-1", None))
