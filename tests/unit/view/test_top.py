"""`glassbox top` without a terminal: what a frame says, what keys change, what a look brings."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text

from glassbox.core.statistics import INDEX, STATISTICS, Phase
from glassbox.store.merge import Detail
from glassbox.store.snapshot import Snapshot
from glassbox.view import heat
from glassbox.view.frame import Look, frame, last_scroll, sort_keys
from glassbox.view.live import MAX_INTERVAL_S, MIN_INTERVAL_S, _Poller, parse_keys, press
from glassbox.view.measured import Measured, exported_statistics
from glassbox.view.over_time import Watch
from glassbox.view.scrape import read_text
from glassbox.view.text import format_value
from tests.export_samples import changed, make_snapshot
from tests.metrics_pages import later, metrics_page

NOW = 1000.0
COLUMNS = tuple(exported_statistics())
LOOK = Look(COLUMNS, COLUMNS[0])
SNAPSHOT = make_snapshot(layers=tuple(range(12)), heads=4)


def look_at(snapshot: Snapshot = SNAPSHOT, detail: Detail = "head", time_s: float = NOW) -> Measured:
    return replace(_read(snapshot, detail), time_s=time_s)


@cache
def _read(snapshot: Snapshot, detail: Detail) -> Measured:
    return read_text(metrics_page([snapshot], detail), "a page", NOW)


def watching(*looks: Measured) -> Watch:
    watch = Watch()
    for look in looks:
        watch.take(look)
    return watch


def shown(watch: Watch, look: Look = LOOK, width: int = 132, height: int | None = None, now_s: float = NOW) -> str:
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(frame(watch, look, now_s, width, height))
    return capture.get()


def places(text: str) -> list[str]:
    """First word of each line of the table."""
    lines = text.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(("layer ", "head ")) and "rows" in line)
    lines = [line for line in lines[begin + 1 :] if "q quit" not in line]
    return [line.split()[0] for line in lines if line[:1].isdigit() or line.startswith("all")]


class TestNumbers:
    @pytest.mark.parametrize("detail", ["model", "layer", "head"])
    def test_a_line_has_the_means_of_its_layer(self, detail: Detail) -> None:
        """Sums over counts of the snapshot, heads added."""
        text = shown(watching(look_at(detail=detail)), replace(LOOK, coloured=False))
        row = next(line.split() for line in text.splitlines() if line.startswith("all" if detail == "model" else "7 "))
        where = slice(None) if detail == "model" else 7
        counts, sums = (a[where][..., 1, INDEX["sink_ratio"]] for a in (SNAPSHOT.counts.sum(-1), SNAPSHOT.sums))
        assert format_value(float(sums.sum() / counts.sum())) in row
        assert f"{SNAPSHOT.rows[where][..., 1].sum():,}" in row

    def test_the_second_frame_has_rates(self) -> None:
        """Rows a second of what came in between, not of all."""
        text = shown(watching(look_at(), look_at(later(SNAPSHOT, 3), time_s=NOW + 4)), now_s=NOW + 4)
        added = make_snapshot(seed=3, layers=SNAPSHOT.layers, heads=4).rows[7, :, 1].sum()
        row = next(line.split() for line in text.splitlines() if line.startswith("7 "))
        assert format_value(added / 4) in row
        assert "decode rows, last 4 s, 12 layers x 4 heads" in text
        assert "steps 1,100 (25.0/s)" in text
        assert "overhead 6.25%" in text

    def test_the_header_tells_model_engine_and_faults(self) -> None:
        """Who is looked at, and what is wrong."""
        text = shown(watching(look_at()))
        for words in ("tiny/model", "engine 0", "CPU_ATTN vLLM 0.32.0", "sample rate 0.01", "errors 1 (sampler)"):
            assert words in text
        assert f"nonfinite {SNAPSHOT.nonfinite.sum()}" in text
        assert "0.1 s in all" in text

    def test_nothing_measured_is_a_frame(self) -> None:
        """A server just begun: dashes, no error."""
        empty = replace(SNAPSHOT, **{n: getattr(SNAPSHOT, n) * 0 for n in ("counts", "sums", "rows", "nonfinite")})
        for detail in ("model", "layer", "head"):
            text = shown(watching(look_at(empty, detail)), LOOK)
            assert "rows 0" in text

    def test_heads_side_by_side_without_colours_are_digits(self) -> None:
        """Tenths of the scale, a digit a head."""
        text = shown(watching(look_at()), replace(LOOK, coloured=False, focus=STATISTICS[INDEX["top1_ratio"]]))
        values = look_at().mean(STATISTICS[INDEX["top1_ratio"]], Phase.DECODE)[7]
        digits = [str(min(int(min(value, 1.0) * 10), 9)) for value in values]
        assert digits == next(line.split() for line in text.splitlines() if line.startswith("7 "))[-4:]

    def test_colours_go_by_value(self) -> None:
        """The largest entropy of the column has the lightest colour, the smallest the darkest."""
        console = Console(width=132, color_system="truecolor", force_terminal=True)
        with console.capture() as capture:
            console.print(frame(watching(look_at(detail="layer")), replace(LOOK, focus=COLUMNS[2]), NOW, 132))
        text = Text.from_ansi(capture.get())
        values = look_at(detail="layer").quantile(COLUMNS[2], Phase.DECODE, 0.5)[:, 0]
        backgrounds = {str(span.style.bgcolor.name) for span in text.spans if span.style.bgcolor}  # type: ignore[union-attr]
        assert {heat.hexadecimal(float(s)) for s in heat.shares(COLUMNS[2], values)} <= backgrounds


class TestOrder:
    def test_by_a_statistic(self) -> None:
        """Largest first; the other way round on demand."""
        values = look_at().coarser("layer").mean(COLUMNS[4], Phase.DECODE)[:, 0]
        expected = [str(i) for i in np.argsort(-values, kind="stable")]
        look = replace(LOOK, sort=COLUMNS[4].name)
        assert expected == places(shown(watching(look_at()), look))
        assert expected[::-1] == places(shown(watching(look_at()), replace(look, reverse=True)))

    def test_by_a_statistic_that_has_no_column(self) -> None:
        """The order is the same when it isn't shown."""
        look = replace(LOOK, sort="sink_ratio")
        few = replace(look, statistics=(COLUMNS[0],))
        assert places(shown(watching(look_at()), look)) == places(shown(watching(look_at()), few))

    def test_a_line_for_each_head(self) -> None:
        """`layer.head`, sorted over all layers; without heads there are layers."""
        look = replace(LOOK, by_head=True, sort="rows")
        found = places(shown(watching(look_at()), look))
        flat = SNAPSHOT.rows[:, :, 1].ravel()
        assert 48 == len(found)
        assert [f"{k // 4}.{k % 4}" for k in np.argsort(-flat, kind="stable")] == found
        assert 12 == len(places(shown(watching(look_at(detail="layer")), look)))


class TestSize:
    @pytest.mark.parametrize("width", [20, 40, 80, 100, 132, 250])
    @pytest.mark.parametrize("height", [6, 12, 24, 60])
    @pytest.mark.parametrize("detail", ["model", "layer", "head"])
    def test_a_frame_fits_the_terminal(self, detail: Detail, height: int, width: int) -> None:
        """No line wraps and none is below the bottom, whatever the size."""
        watch = watching(look_at(detail=detail))
        lines = shown(watch, LOOK, width, height).splitlines()
        assert max(len(line) for line in lines) <= width
        if height >= 12 and width >= 40:
            assert len(lines) <= height
            assert places("\n".join(lines))[0] in {"0", "all"}

    def test_the_chosen_statistic_stays(self) -> None:
        """When there is room for one column only, it is the one in focus."""
        text = shown(watching(look_at()), replace(LOOK, focus=COLUMNS[-1]), 26, 24)
        assert "lookback" in text
        assert "entropy" not in text

    def test_scrolling_shows_the_rest(self) -> None:
        """Beyond the end the last lines stay."""
        watch = watching(look_at())
        assert "0" == places(shown(watch, LOOK, 100, 14))[0]
        assert "12 of 12" in shown(watch, replace(LOOK, scroll=last_scroll(watch, LOOK, NOW, 100, 14)), 100, 14)
        assert "11 of 12" in shown(watch, replace(LOOK, scroll=last_scroll(watch, LOOK, NOW, 100, 14) - 1), 100, 14)
        last = places(shown(watch, replace(LOOK, scroll=99), 100, 14))
        assert "11" == last[-1]
        assert "of 12  " in shown(watch, LOOK, 100, 14)


class TestWatch:
    def test_the_same_numbers_change_nothing(self) -> None:
        """Between two snapshots of the server the last change stays."""
        watch = watching(look_at(), look_at(later(SNAPSHOT, 1), time_s=NOW + 2))
        before = watch.rows
        watch.take(look_at(later(SNAPSHOT, 1), time_s=NOW + 30))
        assert (before, NOW + 2, NOW + 30) == (watch.rows, watch.changed_s, watch.answered_s)
        assert "No new step for 28 s; these are the last numbers." in shown(watch, now_s=NOW + 31)

    def test_an_answer_that_takes_long_is_no_idle_server(self) -> None:
        """A large page from a busy server: the age of the numbers is told, and nothing of its steps."""
        text = shown(watching(look_at()), now_s=NOW + 20)
        assert "These are the numbers of 20 s ago." in text
        assert "No new step" not in text

    def test_steps_without_rows_keep_the_rows(self) -> None:
        """At low sample rates most changes have none."""
        first = later(SNAPSHOT, 1)
        watch = watching(look_at(), look_at(first, time_s=NOW + 2))
        watch.take(look_at(changed(first, steps=first.steps + 50), time_s=NOW + 4))
        assert watch.rows is not None
        assert watch.pulse is not None
        assert (True, 0.0, 50) == (watch.rows.rows.any(), watch.pulse.rows.sum(), watch.pulse.engines.steps)

    def test_a_server_that_goes_away_and_comes_back(self) -> None:
        """It says so, keeps the last numbers, and then goes on from zero."""
        watch = watching(look_at(later(SNAPSHOT, 1)))
        watch.fail("can't read it", NOW + 5)
        watch.fail("can't read it", NOW + 9)
        text = shown(watch, now_s=NOW + 10)
        assert "No answer for 5 s; trying on. can't read it" in text
        assert 12 == len(places(text))
        watch.take(look_at(make_snapshot(seed=9, steps=3, layers=SNAPSHOT.layers, heads=4), time_s=NOW + 20))
        text = shown(watch, now_s=NOW + 20)
        assert "No answer" not in text
        assert "The server began anew; this is all since then." in text
        assert "since the start" in text

    def test_before_the_first_look(self) -> None:
        """Nothing yet."""
        watch = Watch()
        assert (None, True) == (watch.now, math.isnan(watch.answered_s))


class TestKeys:
    def test_each_key_of_the_last_line_does_something(self) -> None:
        """And pressing it often comes back to the beginning, or ends at a bound."""
        for key in "tTsSrph ":
            look = press(key, LOOK, 12)
            assert look != LOOK
            for _ in range(100):
                if look == LOOK:
                    break
                look = press(key, look, 12)
            assert look == LOOK, key
        for key, bound in (("+", MAX_INTERVAL_S), ("-", MIN_INTERVAL_S)):
            look = LOOK
            for _ in range(20):
                look = press(key, look, 12)
            assert bound == look.interval_s

    def test_scrolling_stays_within_the_table(self) -> None:
        """From the first line to the last, also when the window has grown in between."""
        assert 0 == press("up", LOOK, 12).scroll
        assert 12 == press("end", LOOK, 12).scroll
        assert 11 == press("up", press("end", LOOK, 12), 12).scroll
        assert 2 == press("up", replace(LOOK, scroll=9), 3).scroll
        assert 10 == press("page down", LOOK, 12).scroll
        assert 0 == press("home", press("end", LOOK, 12), 12).scroll

    def test_other_keys_do_nothing(self) -> None:
        """Nor does an escape sequence that isn't known."""
        for key in ("x", "\x1b", "Q", "1"):
            assert LOOK == press(key, LOOK, 12)

    def test_escape_sequences(self) -> None:
        """As terminals send them, several at once."""
        assert ["up", "t", "page down", "down", "home"] == parse_keys("\x1b[At\x1b[6~\x1bOB\x1b[H")

    def test_every_order_can_be_asked_for(self) -> None:
        """All sort keys make a frame."""
        for sort in sort_keys():
            assert 12 == len(places(shown(watching(look_at()), replace(LOOK, sort=sort))))


class TestScale:
    def test_shares_have_one_scale_and_counts_a_logarithmic_one(self) -> None:
        """0.5 is the middle of a share; 10 is the middle between 1 and 100 keys."""
        ratio, keys = STATISTICS[INDEX["sink_ratio"]], STATISTICS[INDEX["effective_keys"]]
        assert [0.25, 0.5] == pytest.approx(heat.shares(ratio, [0.25, 0.5]).tolist())
        assert [0.0, 0.5, 1.0] == pytest.approx(heat.shares(keys, [1.0, 10.0, 100.0]).tolist())

    def test_one_value_and_none(self) -> None:
        """Equal values are in the middle, no value has no colour."""
        logit = STATISTICS[INDEX["max_logit"]]
        assert [0.5, 0.5] == pytest.approx(heat.shares(logit, [3.0, 3.0]).tolist())
        assert np.isnan(heat.shares(logit, [math.nan])).all()

    def test_text_can_be_read_on_every_colour(self) -> None:
        """Contrast of at least 4.5 to 1 (WCAG 2, level AA), computed as it is defined there."""

        def luminance(red: int, green: int, blue: int) -> float:
            parts = [p / 255 for p in (red, green, blue)]
            linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

        for share in np.linspace(0, 1, 101):
            background = luminance(*heat.colour(share))
            text = 0.0 if heat.text_colour(share) == "#000000" else 1.0
            low, high = sorted((background, text))
            assert (high + 0.05) / (low + 0.05) >= 4.5, share


def test_whatever_an_answer_does_is_told() -> None:
    """The thread that asks goes on, and says why there are no new numbers."""

    def ask() -> Measured:
        raise KeyError("\x1b[31mno")

    poller = _Poller(ask, interval_s=3600)
    poller.again.set()
    poller.start()
    for _ in range(2):
        assert "the answer can't be read (KeyError: '\\x1b[31mno')" == str(poller.answers.get(timeout=60))
        poller.again.set()
