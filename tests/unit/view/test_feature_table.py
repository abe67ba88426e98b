"""The table of features and its parts: nothing is lost or there twice, and nothing in a file is believed."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glassbox.signals.features import Feature
from glassbox.view.measured import ViewError
from glassbox.view.samples.feature_table import read_table, to_arrow
from glassbox.view.samples.parts import Parts, open_parts
from tests.sample_tables import ORIGIN, TELLING, make_rows, write_table


class TestTable:
    def test_is_read_as_it_was_written(self, tmp_path: Path) -> None:
        """Labels, groups, lengths and values; samples with a problem are left out, and counted."""
        rows = make_rows(6, groups=2)
        rows[2] = replace(rows[2], problem="too long", features={}, label=None)
        rows[3] = replace(rows[3], label=None, group=None)
        table = read_table(write_table(tmp_path / "a.parquet", rows))
        kept = [row for row in rows if row.problem is None]
        assert 1 == table.problems
        assert ORIGIN == table.origin
        assert tuple(row.id for row in kept) == table.ids
        assert [0, 1, -1, 0, 1] == table.labels.tolist()
        assert table.groups is not None
        assert ("g0", "g0", "g0", "g0") == tuple(table.groups[i] for i in (0, 1, 3, 4))
        assert table.groups[2] not in {"g0", "g1"}
        assert [[row.prompt_tokens, 8] for row in kept] == table.lengths.tolist()
        column = table.features.index(Feature("prompt", "entropy_ratio", 1, 1))
        assert np.float32([row.features[TELLING] for row in kept]).tolist() == table.values[:, column].tolist()

    def test_a_feature_that_some_samples_lack(self, tmp_path: Path) -> None:
        """It has no value there."""
        rows = make_rows(4)
        rows[1] = replace(rows[1], features={"prompt_span.a_L0_H0": 0.25})
        table = read_table(write_table(tmp_path / "a.parquet", rows))
        column = table.values[:, [feature.name for feature in table.features].index("prompt_span.a_L0_H0")]
        assert [True, False, True, True] == np.isnan(column).tolist()
        assert 0.25 == column[1]

    def test_what_others_make_of_it(self, tmp_path: Path) -> None:
        """Labels that were written over as numbers, columns of their own, no metadata, features in double precision."""
        arrow = to_arrow(make_rows(4), ORIGIN)
        arrow = arrow.set_column(arrow.column_names.index("label"), "label", pa.array([1.0, 0.0, None, 1.0]))
        arrow = arrow.set_column(arrow.column_names.index(TELLING), TELLING, pa.array([0.5, math.inf, None, 2.0]))
        arrow = arrow.append_column("note", pa.array(list("abcd"))).replace_schema_metadata(None)
        pq.write_table(arrow, tmp_path / "a.parquet")
        table = read_table(tmp_path / "a.parquet")
        assert ("unknown", [1, 0, -1, 1]) == (table.model_name, table.labels.tolist())
        column = table.values[:, table.features.index(Feature("prompt", "entropy_ratio", 1, 1))]
        assert [0.5, 2.0] == column[[0, 3]].tolist()
        assert np.isnan(column[[1, 2]]).all()

    def test_only_some_features(self, tmp_path: Path) -> None:
        """By a pattern; one that matches nothing is a mistake."""
        table = read_table(write_table(tmp_path / "a.parquet", make_rows(4)))
        assert {"answer"} == {feature.signal for feature in table.matching("answer_*").features}
        with pytest.raises(ViewError, match=r"no feature of .* matches 'x_.'; they have names such as answer_"):
            table.matching("x_*")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.drop_columns(["label"]), "must have a column `label` and columns of features"),
            (lambda t: t.select(["sample", "label"]), "must have a column `label` and columns of features"),
            (lambda t: t.select(["sample", "label", "problem"]), "has features of none of its samples: .* `problem`"),
            (
                lambda t: t.set_column(t.column_names.index("label"), "label", pa.array([2, 0, 1, 0])),
                "the column label must have true and false",
            ),
            (
                lambda t: t.set_column(t.column_names.index(TELLING), TELLING, pa.array(list("abcd"))),
                f"the column {TELLING} must have numbers, got string",
            ),
            (
                lambda t: t.replace_schema_metadata({"glassbox": json.dumps({"format": "other"})}),
                "the metadata glassbox: version must be there",
            ),
            (lambda t: t.replace_schema_metadata({"glassbox": "{"}), r"the metadata glassbox: must be JSON"),
        ],
    )
    def test_what_is_no_table_of_features(self, tmp_path: Path, change: Any, message: str) -> None:
        """Which file, and what it lacks."""
        pq.write_table(change(to_arrow(make_rows(4), ORIGIN)), tmp_path / "a.parquet")
        with pytest.raises(ViewError, match=message):
            read_table(tmp_path / "a.parquet")

    def test_garbage(self, tmp_path: Path) -> None:
        """Bytes of others, and a part of a file."""
        whole = write_table(tmp_path / "a.parquet", make_rows(4)).read_bytes()
        for content in (b"", b"\x80\x04garbage", whole[:2000], whole[2000:], whole[:2000] + bytes(500) + whole[2500:]):
            (tmp_path / "b.parquet").write_bytes(content)
            with pytest.raises(ViewError, match=r"b\.parquet"):
                read_table(tmp_path / "b.parquet")


class TestBombs:
    """Files of some kilobytes, of which a reader would make gigabytes."""

    @pytest.mark.parametrize("name", ["id", "group", "problem"])
    def test_a_text_again_and_again(self, name: str, tmp_path: Path) -> None:
        """A megabyte a hundred thousand times."""
        count = 100_000
        texts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array(["x" * (1 << 20)]))
        self.write(tmp_path, count, **{name: texts})
        with pytest.raises(ViewError, match=f"the texts of {name} must take at most 256 MB, got 1000"):
            read_table(tmp_path / "a.parquet")

    def test_texts_for_numbers(self, tmp_path: Path) -> None:
        """They are not unpacked to see that they are none."""
        count = 100_000
        texts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array(["x" * (1 << 20)]))
        for name in ("label", TELLING, "prompt_tokens"):
            self.write(tmp_path, count, **{name: texts})
            with pytest.raises(ViewError, match=f"the column {name} must have (numbers|true and false)"):
                read_table(tmp_path / "a.parquet")

    def test_rows_without_end(self, tmp_path: Path) -> None:
        """More of them than a file of samples may have."""
        self.write(tmp_path, 1_000_001)
        assert (tmp_path / "a.parquet").stat().st_size < 100_000
        with pytest.raises(ViewError, match="must have at most 1,000,000 samples, got 1,000,001"):
            read_table(tmp_path / "a.parquet")

    def test_what_pages_unpack_to(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As the file declares."""
        monkeypatch.setattr("glassbox.view.samples.feature_table.MAX_UNPACKED_BYTES", 1 << 16)
        self.write(tmp_path, 4, id=pa.array(["x" * 40_000] * 3 + ["y" * 40_000]))
        with pytest.raises(ViewError, match="must unpack to at most"):
            read_table(tmp_path / "a.parquet")

    def write(self, folder: Path, count: int, **columns: Any) -> None:
        whole = {
            "label": pa.array(np.arange(count) % 2 == 0),
            TELLING: pa.array(np.zeros(count, np.float32)),
            **columns,
        }
        pq.write_table(pa.table(whole), folder / "a.parquet", store_schema=False)


SETTINGS = {"model": "m", "data": "1234", "max_tokens": 8}


class TestParts:
    def open(self, tmp_path: Path, restart: bool = False, **changes: Any) -> Any:
        return open_parts(tmp_path / "a.parquet", SETTINGS | changes, ORIGIN, restart=restart)

    def test_a_run_goes_on_where_it_was_ended(self, tmp_path: Path) -> None:
        """Whatever order the parts have come in, and whatever a killed writer has left; the folder goes in the end."""
        rows = make_rows(9)
        with self.open(tmp_path) as parts:
            parts.add(rows[3:6])
            parts.add(rows[:3])
        (parts.folder / ".part-000000006.parquet.tmp").write_bytes(b"PAR1 half of it")
        with self.open(tmp_path) as parts:
            assert {0, 1, 2, 3, 4, 5} == parts.done
            parts.add(rows[6:])
            assert {} == parts.merge(tmp_path / "a.parquet")
        table = read_table(tmp_path / "a.parquet")
        assert tuple(row.id for row in rows) == table.ids
        assert [tmp_path / "a.parquet"] == list(tmp_path.iterdir())

    def test_ended_between_the_table_and_its_parts(self, tmp_path: Path) -> None:
        """The next run makes the same table once more."""
        rows = make_rows(4)
        with self.open(tmp_path) as parts:
            parts.add(rows)
            write_table(tmp_path / "a.parquet", rows[:1])  # as if that were all of it
        with self.open(tmp_path) as parts:
            assert {0, 1, 2, 3} == parts.done
            parts.merge(tmp_path / "a.parquet")
        assert 4 == len(read_table(tmp_path / "a.parquet").ids)

    def test_problems_are_counted(self, tmp_path: Path) -> None:
        """A sample without features has a row, too; its features are null in a part that has none at all."""
        rows = make_rows(3)
        with self.open(tmp_path) as parts:
            parts.add([replace(rows[0], problem="too long", features={})])
            parts.add(rows[1:])
            assert {"too long": 1} == parts.merge(tmp_path / "a.parquet")
        assert pq.read_table(tmp_path / "a.parquet")["problem"].to_pylist() == ["too long", None, None]

    def test_other_settings_are_not_mixed(self, tmp_path: Path) -> None:
        """What differs is named; --restart forgets what was done."""
        with self.open(tmp_path) as parts:
            parts.add(make_rows(2))
        with (
            pytest.raises(ViewError, match=r"was begun with another data and max_tokens; .* begin anew with --restart"),
            self.open(tmp_path, data="5678", max_tokens=9),
        ):
            pass
        with self.open(tmp_path, restart=True, max_tokens=9) as parts:
            assert set() == parts.done

    def test_a_run_that_got_nowhere(self, tmp_path: Path) -> None:
        """Whoever corrects an option need not begin anew: nothing depends on the old one. Nor are parts without
        settings mixed with any."""
        with self.open(tmp_path):
            pass
        with self.open(tmp_path, max_tokens=9) as parts:
            parts.add(make_rows(2))
        with pytest.raises(ViewError, match="was begun with another max_tokens"), self.open(tmp_path):
            pass
        (tmp_path / "a.parquet.parts" / "settings.json").unlink()
        with (
            pytest.raises(ViewError, match=r"settings.json is missing; begin anew with --restart"),
            self.open(tmp_path),
        ):
            pass

    def test_one_at_a_time(self, tmp_path: Path) -> None:
        """Two would write each other's samples."""
        with (
            self.open(tmp_path),
            pytest.raises(ViewError, match="another `glassbox extract` writes"),
            self.open(tmp_path),
        ):
            pass

    def test_a_damaged_part(self, tmp_path: Path) -> None:
        """It is said which one, and what to do."""
        with self.open(tmp_path) as parts:
            parts.add(make_rows(2))
            (path,) = parts.folder.glob("part-*")
            path.write_bytes(b"PAR1")
            with pytest.raises(ViewError, match=r"part-000000000.parquet can't be read .* begin anew with --restart"):
                Parts(parts.folder, ORIGIN)

    def test_what_others_have_put_there(self, tmp_path: Path) -> None:
        """A pipe is not waited for; a folder that anybody may write to, or a link to one, is not used, nor is a link
        for the lock followed."""
        with self.open(tmp_path) as parts:
            parts.add(make_rows(2))
        os.mkfifo(parts.folder / "part-000000007.parquet")
        with pytest.raises(ViewError, match=r"part-000000007\.parquet can't be read"), self.open(tmp_path):
            pass
        (parts.folder / "part-000000007.parquet").unlink()
        parts.folder.chmod(0o777)
        with pytest.raises(ViewError, match="must be a folder of this user"), self.open(tmp_path):
            pass
        parts.folder.chmod(0o755)
        (parts.folder / "lock").unlink()
        (parts.folder / "lock").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(OSError, match="Too many levels"), self.open(tmp_path):
            pass
        assert not (tmp_path / "elsewhere").exists()
        parts.folder.rename(tmp_path / "moved")
        parts.folder.symlink_to(tmp_path / "moved")
        with pytest.raises(ViewError, match="must be a folder of this user"), self.open(tmp_path):
            pass
