"""The YAML is edited while `vllm serve` runs: good edits take effect within two seconds, bad ones change nothing."""

import random
import time
from collections.abc import Iterator
from typing import Any, Final

import httpx
import pytest

from tests.broken_configs import BROKEN, Broken
from tests.serving import BASE_CONFIG, EFFECT_S, MODEL_NAME, GlassboxServer, unprivileged, wait_for
from tests.waiting import require_within, seconds_of

pytestmark = pytest.mark.e2e

NUM_LAYERS, NUM_HEADS = 30, 9
# Snapshots this far apart can't be what shows an edit in time.
RARE_EXPORT: Final = {"export": {"interval_s": 60}}
KEPT: Final = "The last good configuration stays in force"
_numbers = random.Random(2)


def new_prompt(length: int) -> list[int]:
    """Token ids that no test has used, so that nothing of them is in the prefix cache."""
    return [_numbers.randrange(1000, 40000) for _ in range(length)]


class Log:
    """What a server writes from now on."""

    def __init__(self, server: GlassboxServer) -> None:
        self._path = server.log_path
        self._start = self._path.stat().st_size

    def lines(self, having: str) -> list[str]:
        """Lines since then that hold a text."""
        with self._path.open("rb") as file:
            file.seek(self._start)
            return [line for line in file.read().decode(errors="replace").splitlines() if having in line]

    def wait(self, having: str) -> list[str]:
        """Wait for such a line."""
        return wait_for(lambda: self.lines(having), what=f"{having!r} in the log")


def steps(server: GlassboxServer) -> tuple[float, float]:
    """`steps_total` and `sampled_steps_total`, the traffic before included."""
    server.settled_rows()
    return (
        server.metric("glassbox_steps_total") or 0.0,
        server.metric("glassbox_sampled_steps_total") or 0.0,
    )


def rows(server: GlassboxServer, **labels: str) -> float:
    """`rows_total` with these labels."""
    return server.metric("glassbox_attention_rows_total", **labels) or 0.0


def edit(server: GlassboxServer, **changes: Any) -> None:
    """Edit the YAML and wait until the worker has taken it."""
    log = Log(server)
    server.edit_config(**changes)
    log.wait(f"Reloaded {server.config_path}")


def wait_rate(server: GlassboxServer, rate: float) -> None:
    """Wait until the worker's rate is `rate`."""
    server.wait_metric("glassbox_sample_rate", lambda value: value == rate)


def wait_reload(server: GlassboxServer, successful: int) -> None:
    """Wait until the last reading of the file is told to have been good, or bad."""
    server.wait_metric("glassbox_config_last_reload_successful", lambda value: value == successful)


@pytest.fixture
def server(server: GlassboxServer) -> Iterator[GlassboxServer]:
    """The shared server, which has served something (before that, there is nothing to show)."""
    server.complete("Hello", max_tokens=2)
    server.wait_metric("glassbox_steps_total", bool)
    yield server
    server.restore_config()
    # The next test starts from the configuration of the start, not from a moment before.
    wait_rate(server, BASE_CONFIG["sample_rate"])
    wait_reload(server, 1)


class TestSampleRate:
    def test_shows_within_two_seconds(self, server: GlassboxServer) -> None:
        """0.01, then 1, then 0: the gauge follows, though nothing is served and snapshots are a minute apart."""
        for rate in (0.01, 1.0, 0.0):

            def follow(rate: float = rate) -> float:
                server.edit_config(sample_rate=0.5, **RARE_EXPORT)
                wait_rate(server, 0.5)
                server.edit_config(sample_rate=rate, **RARE_EXPORT)
                return seconds_of(lambda: wait_rate(server, rate))

            require_within(EFFECT_S, follow)

    def test_steps_are_sampled_accordingly(self, server: GlassboxServer) -> None:
        """After the edit every step, none, or one in a hundred is measured."""
        for rate, least, most in ((0.01, 0, 1), (1.0, 48, 60), (0.0, 0, 0)):
            server.edit_config(sample_rate=rate)
            wait_rate(server, rate)
            before = steps(server)
            server.complete(new_prompt(20), max_tokens=48, ignore_eos=True)
            after = steps(server)
            served, sampled = after[0] - before[0], after[1] - before[1]
            assert 48 <= served <= 60
            assert least <= sampled <= most, f"at rate {rate}"
            assert rate < 1 or sampled == served

    def test_under_traffic(self, server: GlassboxServer) -> None:
        """An edit during a request changes what is measured of that very request.

        The worker takes it within two seconds. What was measured is read afterwards: a scrape that shares a core with
        the streaming API server takes seconds itself.
        """
        server.edit_config(sample_rate=0.0)
        wait_rate(server, 0.0)
        before = steps(server)
        stream = open_stream(server, new_prompt(30), max_tokens=1500)
        next(stream)
        edit(server, sample_rate=1.0)
        time.sleep(EFFECT_S)
        assert next(stream, None) is not None, "the request must still run when the edit takes effect"
        stream.close()
        edit(server, sample_rate=0.0)
        after = steps(server)
        assert 0 < after[1] - before[1] < after[0] - before[0]


def open_stream(server: GlassboxServer, prompt: list[int], max_tokens: int) -> Iterator[str]:
    """Lines of a streamed completion; closing it ends the request."""
    body = {
        "model": MODEL_NAME,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as reply:
        reply.raise_for_status()
        yield from (line for line in reply.iter_lines() if line.startswith("data:"))


class TestLogLevel:
    def test_info_to_debug_and_back(self, server: GlassboxServer) -> None:
        """Debug lines of glassbox come before the next snapshot is due, and end with the level."""
        log = Log(server)
        server.edit_config(log_level="debug", **RARE_EXPORT)
        (line, *_) = log.wait("Snapshot written")
        assert " DEBUG " in line
        server.edit_config(log_level="info")
        log.wait("log_level debug -> info")
        quiet = Log(server)
        server.complete(new_prompt(8), max_tokens=4)
        server.settled_rows()
        assert quiet.lines(" DEBUG ") == []


class TestSampling:
    def test_layers(self, server: GlassboxServer) -> None:
        """Only the layers in the list are measured; one that isn't there is a warning."""
        log = Log(server)
        edit(server, sampling={"layers": [0, 5, NUM_LAYERS]})
        (line, *_) = log.wait("sampling.layers names layers that are not observed")
        assert f"the model has no attention layer {NUM_LAYERS}. Observed are 0-{NUM_LAYERS - 1}" in line
        assert " WARNING " in line
        before = self.by_layer(server)
        server.complete(new_prompt(20), max_tokens=5, ignore_eos=True)
        after = self.by_layer(server)
        assert [0, 5] == [layer for layer in range(NUM_LAYERS) if after[layer] > before[layer]]

    def test_prefill_rows_per_request(self, server: GlassboxServer) -> None:
        """So many positions of a prompt, and each generated token that is fed back."""
        edit(server, sampling={"prefill_rows_per_request": 3})
        before = self.by_phase(server)
        server.complete(new_prompt(40), max_tokens=6, ignore_eos=True)
        after = self.by_phase(server)
        assert after["prefill"] - before["prefill"] == 3 * NUM_LAYERS * NUM_HEADS
        assert after["decode"] - before["decode"] == 5 * NUM_LAYERS * NUM_HEADS

    def test_max_rows_per_step(self, server: GlassboxServer) -> None:
        """What is beyond the limit is not measured but counted as dropped."""
        edit(server, sampling={"max_rows_per_step": 2})
        before = self.by_phase(server)
        dropped = server.metric("glassbox_dropped_rows_total") or 0.0
        server.complete(new_prompt(40), max_tokens=1)
        after = self.by_phase(server)
        assert after["prefill"] - before["prefill"] == 2 * NUM_LAYERS * NUM_HEADS
        now = server.metric("glassbox_dropped_rows_total", reason="max_rows_per_step") or 0.0
        assert now - dropped == 6 * NUM_LAYERS * NUM_HEADS

    @staticmethod
    def by_layer(server: GlassboxServer) -> dict[int | None, float]:
        server.settled_rows()
        measured = server.measured()
        return dict(zip(measured.layers, measured.rows_of(None).sum(axis=1).tolist(), strict=True))

    @staticmethod
    def by_phase(server: GlassboxServer) -> dict[str, float]:
        server.settled_rows()
        return {phase: rows(server, phase=phase) for phase in ("prefill", "decode")}


class TestDetail:
    def test_model_layer_head(self, server: GlassboxServer) -> None:
        """The labels of the next scrape are those of the new detail, the sums stay."""
        total = server.settled_rows()
        for detail, labels in (("model", set()), ("head", {"layer", "head"}), ("layer", {"layer"})):
            server.edit_config(export={"interval_s": 1, "prometheus": {"detail": detail, "max_series": 10_000_000}})

            def shown() -> list[dict[str, str]]:
                return [
                    sample.labels
                    for family in server.metrics()
                    for sample in family.samples
                    if sample.name == "glassbox_attention_rows_total"
                ]

            found = wait_for(
                shown,
                lambda series: {key for labels in series for key in labels} & {"layer", "head"} == labels,
                what=f"detail {detail}",
            )
            assert all({"model_name", "engine", "phase"} <= series.keys() for series in found)
            assert rows(server) == total
        assert {series["layer"] for series in found} == {str(layer) for layer in range(NUM_LAYERS)}


def check_broken_edit(server: GlassboxServer, broken: Broken) -> None:
    """Break the file of a serving server, look at what it does, mend the file."""
    server.restore_config()
    wait_rate(server, 1.0)
    log = Log(server)
    successful = "glassbox_config_last_reload_successful"
    assert server.metric(successful) == 1

    broken.apply(server.config_path)
    wait_reload(server, 0)
    before = steps(server)
    server.complete(new_prompt(10), max_tokens=4, ignore_eos=True)
    after = steps(server)
    assert after[0] - before[0] == after[1] - before[1] >= 4, "sampling goes on at the last good rate"

    # Several looks at the file later there is still one line.
    (line,) = log.lines(KEPT)
    assert broken.message(server.config_path) in line
    assert " ERROR " in line

    server.restore_config()
    wait_reload(server, 1)
    assert len(log.lines(KEPT)) == 1
    assert server.metric("glassbox_sample_rate") == 1


class TestBrokenEdit:
    @pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
    def test_last_good_configuration_is_kept(self, server: GlassboxServer, broken: Broken) -> None:
        """Serving and sampling go on; it is logged once and shown; a mended file counts."""
        if broken.lacks_permission:
            unprivileged()  # as the server was started; skips where root's right to read can't be dropped
        check_broken_edit(server, broken)

    def test_shows_within_two_seconds_whatever_the_interval(self, server: GlassboxServer) -> None:
        """Bad and good again are shown in time though snapshots are a minute apart and nothing is served."""
        good: dict[str, Any] = {**BASE_CONFIG, **RARE_EXPORT}
        server.write_config(good)
        server.wait_metric("glassbox_config_last_reload_timestamp_seconds", bool)

        def there_and_back() -> float:
            took_s = []
            for successful, content in ((0, "sample_rate: 3\n"), (1, good)):
                server.write_config(content)
                took_s.append(seconds_of(lambda successful=successful: wait_reload(server, successful)))
            return max(took_s)

        for _ in range(2):
            require_within(EFFECT_S, there_and_back)
