"""Every supported release that runs on this machine serves and measures what the reference does, bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.releases.smoke import NUM_TOKENS
from tools.vllm_releases import Release, compared_with, runnable

pytestmark = [pytest.mark.integration, pytest.mark.check("smoke", "cpu")]

Smoke = Callable[[Release], dict[str, Any]]
# `make test` has the oldest that runs here and the reference, `make releases` all of them.
OFTEN = (runnable()[0], compared_with())
EVERY = pytest.mark.parametrize(
    "release",
    [
        pytest.param(one, id=one.name, marks=() if one in OFTEN else (pytest.mark.slow, pytest.mark.releases))
        for one in runnable()
    ],
)


@EVERY
class TestSmoke:
    """Six prompts, chunked prefill, every step measured, one request traced."""

    def test_it_is_that_release_and_all_is_observed(self, smoke: Smoke, release: Release) -> None:
        """Without an error, in all layers and steps, and the trace is whole."""
        run = smoke(release)
        assert (release.version, "CPUModelRunner") == (run["vllm"], run["runner"].rpartition(".")[2])
        measured = run["measured"]
        assert measured["attached"]
        assert {} == measured["errors"]
        assert {"observed": 30, "bypassed": {}} == measured["layers"]
        assert measured["steps"] == measured["sampled_steps"] > NUM_TOKENS
        assert all(rows > 0 for rows in measured["rows"].values())
        assert ("finished", NUM_TOKENS, False) == tuple(
            run["trace"][name] for name in ("status", "num_generated", "truncated")
        )

    def test_tokens(self, smoke: Smoke, release: Release) -> None:
        """Those that are served."""
        assert smoke(compared_with())["tokens"] == smoke(release)["tokens"]

    @pytest.mark.parametrize("part", ["rows", "rows_by_head", "counts", "first_sums", "sums"])
    def test_numbers(self, smoke: Smoke, release: Release, part: str) -> None:
        """Histogram counts and sums of every statistic, layer and head."""
        assert smoke(compared_with())["measured"][part] == smoke(release)["measured"][part]

    def test_trace(self, smoke: Smoke, release: Release) -> None:
        """Every array of it."""
        assert smoke(compared_with())["trace"] == smoke(release)["trace"]
