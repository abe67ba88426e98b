"""The heads of the focus score: the rule, by hand, and the file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glassbox.signals.focus_heads import (
    FocusHead,
    FocusHeads,
    FocusHeadsError,
    falls,
    important,
    read_focus_heads,
    write_focus_heads,
)

FOUND = FocusHeads("tiny/model", 4.0, 10, 12, (FocusHead(9, 3, 7.5), FocusHead(4, 5, 4.25)))


class TestRule:
    def test_by_hand(self) -> None:
        """(0.6 - 0.2) / (0.1 + 0.1) = 2; none where nothing changes, and no end where nothing varies."""
        normal = np.array([[[0.5, 0.3, 0.4, np.nan]], [[0.7, 0.3, 0.4, 0.5]]])
        attacked = np.array([[[0.1, 0.3, 0.1, 0.1]], [[0.3, 0.3, 0.1, 0.1]]])
        fall = falls(normal, attacked)
        np.testing.assert_allclose(fall, [[2, 0, np.inf, np.nan]])
        found = important(fall, layers=(7,), heads=(2, 3, 5, 8), deviations=1.9)
        assert (FocusHead(7, 5, 1e6), FocusHead(7, 2, pytest.approx(2.0))) == found
        assert (FocusHead(7, 5, 1e6),) == important(fall, (7,), (2, 3, 5, 8), 2.1)

    def test_a_focus_that_rises(self) -> None:
        """Is none that an attack draws away."""
        assert () == important(falls(np.full((3, 1, 1), 0.1), np.full((3, 1, 1), 0.9)), (0,), (0,), 4.0)


class TestFile:
    def test_round_trip(self, tmp_path: Path) -> None:
        write_focus_heads(tmp_path / "heads.json", FOUND)
        assert FOUND == read_focus_heads(tmp_path / "heads.json")
        assert {(9, 3), (4, 5)} == FOUND.places

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": "x"}, "format must be glassbox focus heads, got 'x'"),
            ({"format_version": 2}, "format_version must be 1, got 2"),
            ({"heads": []}, "heads must be a list of 1 to 65536, got 0"),
            ({"heads": [{"layer": 1, "head": -1, "deviations": 5}]}, r"heads\[0\].head must be a whole number from 0"),
            (
                {"heads": [{"layer": 1, "head": 1, "deviations": float("nan")}]},
                r"heads\[0\].deviations must be a number",
            ),
            ({"heads": [[1, 2]]}, r"heads\[0\] must be a mapping"),
            ({"model": "a\nb"}, "model must be a text of 1 to 256 characters that can be shown"),
            ({"code": "import os"}, "code must be one of format, format_version, model"),
        ],
    )
    def test_errors_name_file_field_rule_and_remedy(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        path = tmp_path / "heads.json"
        write_focus_heads(path, FOUND)
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(
            FocusHeadsError, match=rf"^focus heads .*heads.json: {message}.*; make it with glassbox heads$"
        ):
            read_focus_heads(path)

    def test_what_everybody_may_write_to(self, tmp_path: Path) -> None:
        """Rules end requests by the signal that is taken over them."""
        path = tmp_path / "heads.json"
        write_focus_heads(path, FOUND)
        path.chmod(0o666)
        with pytest.raises(FocusHeadsError, match="must not be writable by everybody, got mode 0666; use chmod o-w"):
            read_focus_heads(path)

    def test_what_is_no_file(self, tmp_path: Path) -> None:
        """A missing one, a folder, one that isn't JSON."""
        (tmp_path / "text").write_text("heads")
        for name, problem in (("none", "No such file"), ("", "Is a directory"), ("text", "must be JSON")):
            with pytest.raises(FocusHeadsError, match=problem):
                read_focus_heads(tmp_path / name)
