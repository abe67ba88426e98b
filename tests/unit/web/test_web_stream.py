"""The feed: which two snapshots an interval lies between, how many may listen, what a frame says."""

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import QueryParams

from glassbox.config.load import GlassboxConfig
from glassbox.core.accumulator_arrays import CUMULATIVE_ARRAYS
from glassbox.export.family_source import FamilySource
from glassbox.store.snapshot import Snapshot, write_snapshot
from glassbox.web import stream
from glassbox.web.answers import RequestError
from glassbox.web.selection import parse_stream
from glassbox.web.stream import KEEP_ALIVE_S, MAX_LISTENERS, Feed, Moment
from tests.export_samples import changed, make_snapshot, split_heads

INTERVAL_S = 5.0
CONFIG = GlassboxConfig.model_validate({"export": {"interval_s": INTERVAL_S}})


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Workers:
    """Tensor-parallel ranks that write their snapshots; each adds the same rows to its own every time."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.added = make_snapshot(heads=4)
        self._now = list(split_heads(self.added, 2))

    def write(self, *ranks: int, time_s: float = 1_700_000_100.0) -> None:
        for rank in ranks:
            part = split_heads(self.added, 2)[rank]
            old = self._now[rank]
            summed = {name: getattr(old, name) + getattr(part, name) for name in CUMULATIVE_ARRAYS}
            self._now[rank] = changed(old, time_s=time_s, steps=old.steps + 10, **summed)
            path = write_snapshot(self.run_dir, self._now[rank])
            # Two writes within the clock tick of the file system would look the same.
            os.utime(path, ns=(0, int(time_s * 1e9) + old.steps))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def workers(tmp_path: Path) -> Workers:
    workers = Workers(tmp_path)
    workers.write(0, 1)
    return workers


@pytest.fixture
def feed(tmp_path: Path, clock: Clock, workers: Workers) -> Feed:
    return Feed(FamilySource(tmp_path, lambda: CONFIG), clock=clock)


def select(query: str = "") -> Any:
    return parse_stream(QueryParams(query))


def rows_of(moment: Moment) -> list[list[int]]:
    """Decode rows of the last interval."""
    assert moment.last is not None
    return moment.last[0].rows[:, :, 1].tolist()  # type: ignore[no-any-return]


class TestInterval:
    def test_one_snapshot_is_no_interval(self, feed: Feed) -> None:
        """The total is there at once, so that a page shows something."""
        moment = feed.poll()
        assert moment.last is None
        assert len(moment.total) == 1

    def test_the_next_one_makes_it(self, feed: Feed, workers: Workers, clock: Clock) -> None:
        """The last interval holds what came between them; the total holds all."""
        first = feed.poll()
        workers.write(0, 1, time_s=1_700_000_105.0)
        clock.now += INTERVAL_S
        moment = feed.poll()
        assert workers.added.rows[:, :, 1].tolist() == rows_of(moment)
        assert (first.total[0].rows + workers.added.rows).tolist() == moment.total[0].rows.tolist()
        assert moment.last is not None
        assert (1_700_000_100.0, 1_700_000_105.0) == (moment.last[0].start_time_s, moment.last[0].time_s)

    def test_nothing_new_is_no_new_moment(self, feed: Feed, clock: Clock) -> None:
        """The same object, however often one asks."""
        first = feed.poll()
        clock.now += INTERVAL_S
        assert feed.poll() is first

    def test_a_frame_waits_for_every_rank(self, feed: Feed, workers: Workers, clock: Clock) -> None:
        """Ranks write one after the other: half of the heads alone would look as if the others had no rows."""
        first = feed.poll()
        clock.now += 3.0
        workers.write(0)
        assert feed.poll() is first
        clock.now += 1.0
        workers.write(1)
        assert workers.added.rows[:, :, 1].tolist() == rows_of(feed.poll())

    def test_a_rank_that_ended_is_waited_for_once(self, feed: Feed, workers: Workers, clock: Clock) -> None:
        """An interval long; from then on, who still writes is enough."""
        first = feed.poll()
        for wait_s in (0.5, INTERVAL_S):
            workers.write(0)
            clock.now += wait_s
            waited = feed.poll()
        assert waited.number == first.number + 1
        workers.write(0)
        clock.now += 0.5
        after = feed.poll()
        assert after.number == waited.number + 1
        part = split_heads(workers.added, 2)[0].rows[:, :, 1].tolist()
        assert [[*row, 0, 0] for row in part] == rows_of(after)

    def test_who_comes_after_hours_gets_no_interval_of_hours(self, feed: Feed, workers: Workers, clock: Clock) -> None:
        """Nobody looked meanwhile, so the last interval begins now."""
        feed.poll()
        workers.write(0, 1)
        clock.now += 7200.0
        assert feed.poll().last is None

    def test_an_empty_run_directory_is_no_error(self, tmp_path: Path, clock: Clock) -> None:
        """vLLM has not warmed up yet; the first snapshot is shown when it comes."""
        feed = Feed(FamilySource(tmp_path / "none", lambda: CONFIG), clock=clock)
        assert () == feed.poll().total
        write_snapshot(tmp_path / "none", make_snapshot())
        clock.now += 1.0
        assert 1 == len(feed.poll().total)

    def test_many_listeners_look_once(self, feed: Feed, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        """Within half a poll the run directory is not looked at again."""
        looks = []
        versions = feed.source.versions
        monkeypatch.setattr(feed.source, "versions", lambda: looks.append(1) or versions())
        feed.poll()
        clock.now += 1.0
        for _ in range(MAX_LISTENERS):
            feed.poll()
        assert [1] == looks


class TestFrames:
    def answer(self, frame: bytes) -> dict[str, Any]:
        name, data = frame.decode().removesuffix("\n\n").split("\n")
        assert "event: frame" == name
        return dict(json.loads(data.removeprefix("data: ")))

    def test_a_frame_has_the_selected_matrices(self, feed: Feed, workers: Workers, clock: Clock) -> None:
        """One statistic and one phase, over the window it names."""
        feed.poll()
        workers.write(0, 1)
        clock.now += INTERVAL_S
        answer = self.answer(feed.frame(feed.poll(), select("statistic=sink_ratio&phase=prefill")))
        assert "last" == answer["window"]
        assert ["prefill"] == list(answer["engine"]["phases"])
        phase = answer["engine"]["phases"]["prefill"]
        assert ["sink_ratio"] == list(phase["statistics"])
        assert workers.added.rows[:, :, 0].tolist() == phase["rows"]

    def test_without_an_interval_it_says_that_it_is_the_total(self, feed: Feed) -> None:
        """What is asked for is not what is there yet."""
        assert "total" == self.answer(feed.frame(feed.poll(), select()))["window"]

    def test_the_same_selection_is_encoded_once(self, feed: Feed) -> None:
        """For all who look at the same."""
        moment = feed.poll()
        assert feed.frame(moment, select("layer=1&head=2")) is feed.frame(moment, select("head=2&layer=1"))

    def test_layers_that_are_not_sampled_are_named(self, tmp_path: Path) -> None:
        """So that the page can say why they are empty."""
        for snapshot in split_heads(make_snapshot(heads=4, sampled_layers=(1,)), 2):
            write_snapshot(tmp_path, snapshot)
        feed = Feed(FamilySource(tmp_path, lambda: CONFIG))
        assert [0] == self.answer(feed.frame(feed.poll(), select()))["engine"]["unsampled_layers"]


class TestListeners:
    def test_there_may_be_so_many(self, feed: Feed) -> None:
        """The next one is told so with a 503, until one goes."""
        for _ in range(MAX_LISTENERS):
            feed.enter()
        with pytest.raises(RequestError, match="at most 16 streams are served at the same time") as caught:
            feed.enter()
        assert 503 == caught.value.status
        feed.leave()
        feed.enter()

    @staticmethod
    def collect(feed: Feed, closing: Iterator[bool]) -> list[str]:
        async def run() -> list[str]:
            return [message.decode() async for message in feed.events(select(), lambda: next(closing))]

        return asyncio.run(run())

    def test_a_stream_ends_with_the_server(self, tmp_path: Path, workers: Workers) -> None:
        """About first, a frame, and an end when the server shuts down."""
        feed = Feed(FamilySource(tmp_path, lambda: CONFIG), poll_s=0.01)
        messages = self.collect(feed, iter([False, False, True]))
        assert ["retry: 2000\nevent: about", "event: frame"] == [text.split("\ndata")[0] for text in messages]

    def test_a_fault_is_told_once_and_counted(
        self, tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The stream goes on, and shows a frame as soon as it can."""
        source = FamilySource(tmp_path, lambda: CONFIG)
        feed = Feed(source, poll_s=0.01)
        broken = iter([True, True, False])
        merged = source.merged

        def fail_twice() -> Any:
            if next(broken):
                raise PermissionError("not for you")
            return merged()

        monkeypatch.setattr(source, "merged", fail_twice)
        messages = self.collect(feed, iter([False, False, False, True]))
        assert ["fault", "frame"] == [text.split("event: ")[1].split("\n")[0] for text in messages[1:]]
        assert "PermissionError: not for you" in messages[1]
        monkeypatch.undo()
        (errors,) = [family for family in source.view().families if family.name == "glassbox_errors_total"]
        assert 1 == {series.labels[-1]: series.value for series in errors.series}["http"]

    def test_a_quiet_stream_is_kept_alive(self, feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
        """A comment from time to time, so that no proxy closes it."""
        feed.poll_s = 0.0
        seconds = iter(range(0, 1000, int(KEEP_ALIVE_S) + 1))
        monkeypatch.setattr("glassbox.web.stream.time.monotonic", lambda: float(next(seconds)))
        messages = self.collect(feed, iter([False] * 3 + [True]))
        assert ":\n\n" in messages


class TestSelection:
    @pytest.mark.parametrize(
        ("query", "message"),
        [
            ("statistic=entropy", "statistic must be one of entropy_ratio, .*, got 'entropy'"),
            ("statistic=max_logit&statistic=top1_ratio", "statistic must be given once, got it 2 times"),
            ("phase=both", "phase must be one of prefill, decode, got 'both'"),
            ("window=day", "window must be one of last, total, got 'day'"),
            ("layer=1", "layer and head must be given together, got no head"),
            ("layer=1&head=-1", "head must be a whole number from 0, got '-1'"),
            ("layer=1_0&head=1", "layer must be a whole number from 0, got '1_0'"),
            ("heads=1", "parameters must be among engine, head, layer, .*, got 'heads'"),
        ],
    )
    def test_a_wrong_parameter_is_named(self, query: str, message: str) -> None:
        """Parameter, rule and value; the answer is a 400."""
        with pytest.raises(RequestError, match=message) as caught:
            select(query)
        assert 400 == caught.value.status

    def test_what_the_server_does_not_have_is_named(self, feed: Feed) -> None:
        """Engines, models, layers and heads are known only there."""
        engines = feed.poll().total
        for query, message in {
            "engine=7": "engine must be one of 0, got '7'",
            "model=gpt": "model must be one of tiny/model, got 'gpt'",
            "layer=9&head=0": r"layer must be an observed layer \(0 to 1\), got 9",
            "layer=0&head=4": "head must be between 0 and 3, got 4",
        }.items():
            with pytest.raises(RequestError, match=message):
                select(query).of(engines)

    def test_a_model_may_be_on_another_engine(self, tmp_path: Path) -> None:
        """Each exists, the pair does not."""
        snapshots: list[Snapshot] = [make_snapshot(), make_snapshot(seed=1, engine="1", model_name="other")]
        for snapshot in snapshots:
            write_snapshot(tmp_path, snapshot)
        engines = FamilySource(tmp_path, lambda: CONFIG).merged().engines
        with pytest.raises(RequestError, match="engine and model must go together, the server has"):
            select("engine=1&model=tiny/model").of(engines)
        assert engines[0].model_name == "other"
        assert (engines[0],) == select("model=other").of(engines)


class TestSlowListeners:
    def test_who_takes_nothing_loses_its_place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """On either port: the server's send waits for ever, the answer doesn't."""
        monkeypatch.setattr(stream, "SEND_S", 0.5)
        write_snapshot(tmp_path, make_snapshot())
        feed = Feed(FamilySource(tmp_path, lambda: CONFIG), poll_s=0.01)
        sent: list[str] = []

        async def send(message: Any) -> None:
            sent.append(message["type"])
            if len(sent) > 2:  # the start and `about`; then nobody takes anything
                await asyncio.Event().wait()

        async def receive() -> Any:
            await asyncio.Event().wait()

        async def listen() -> None:
            feed.enter()
            answer = stream.EventResponse(feed, parse_stream(QueryParams()), lambda: False)
            await asyncio.wait_for(answer({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send), 20)

        asyncio.run(listen())
        assert (0, 3) == (feed.listening, len(sent))
