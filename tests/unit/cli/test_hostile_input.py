"""Commands that read what may be anybody's: one line and a status, no traceback, no orders to the terminal, an end."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from glassbox.cli.main import main
from glassbox.signals.baseline import from_engines, save_baseline
from glassbox.store.merge import merge
from glassbox.view import asking, windows
from tests.export_samples import make_snapshot
from tests.hostile_server import drip, hostile, reply
from tests.metrics_pages import metrics_page, serve_page, write_jsonl

NAME = "tiny/model"
# Orders to a terminal (title, colours, the clipboard), another order of reading, markup, formulas, other pages.
NASTY = "\x1b]0;owned\x07\x1b[31m\u202e\u2066\u200b\x9b31m[bold]$\\frac{$<script>\x00\r"
PAGE = metrics_page([make_snapshot(layers=tuple(range(4)), heads=3)], "head")
SHOWN = ("top", "heatmap", "diff", "baseline")


def invoke(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def reading(command: str, source: str, folder: Path) -> list[str]:
    """Each command that reads a server's page."""
    return {
        "top": ["top", "--once", source],
        "heatmap": ["heatmap", source, "-o", str(folder / "h.svg")],
        "diff": ["diff", source, source, "--min-rows", "1"],
        "baseline": ["baseline", "save", source, "-o", str(folder / "b.npz")],
    }[command]


def of_files(path: Path, folder: Path) -> Iterator[list[str]]:
    """Each command that reads a file of JSON lines."""
    yield ["report", str(path), "-o", str(folder / "r.html")]
    yield ["heatmap", str(path), "-o", str(folder / "h.svg")]
    yield ["diff", str(path), str(path), "--min-rows", "1"]


def assert_one_line(result: Result) -> str:
    """It failed, said why in a line that can be shown, and printed nothing else."""
    assert result.exit_code in (1, 2), result.output
    assert isinstance(result.exception, SystemExit | None), repr(result.exception)
    assert ("", 1) == (result.stdout, len(result.stderr.splitlines()))
    assert result.stderr.startswith("glassbox: ")
    assert result.stderr.removesuffix("\n").isprintable()
    assert len(result.stderr) < 1500
    return result.stderr


def assert_shown(result: Result) -> None:
    """It succeeded, and nothing of it is an order."""
    assert 0 == result.exit_code, result.output
    for text in (result.stdout, result.stderr):
        assert all(line.isprintable() for line in text.split("\n")), repr(text)


def page_with(old: str, new: str) -> str:
    changed = PAGE.replace(old, new)
    assert changed != PAGE
    return changed


def escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


HOSTILE_PAGES = {
    "nothing": "",
    "html": "<html>\x1b[31m</html>",
    "binary": "glassbox_\0\1\2\x1b\n" * 100,
    "half a line": PAGE[: len(PAGE) // 2 + 7],
    "no labels": "glassbox_attention_rows_total 3\n",
    "a long name": page_with(NAME, "x" * 2000),
    "layers that are none": page_with('layer="1"', f'layer="{NASTY[:9]}"'),
    "layers of many digits": page_with('layer="1"', f'layer="{"9" * 5000}"'),
    "places that multiply": "".join(
        f'glassbox_attention_rows_total{{model_name="m",engine="0",phase="decode",layer="{n}",head="{n}"}} 1\n'
        for n in range(20_000)
    ),
    "rows of nan": "\n".join(
        f"{line.rpartition(' ')[0]} NaN" if line.startswith("glassbox_attention_rows_total{") else line
        for line in PAGE.split("\n")
    ),
    "negative buckets": "\n".join(
        f"{line.rpartition(' ')[0]} -5" if "_bucket{" in line else line for line in PAGE.split("\n")
    ),
    "infinite steps": "\n".join(
        f"{line.rpartition(' ')[0]} +Inf" if line.startswith("glassbox_steps_total{") else line
        for line in PAGE.split("\n")
    ),
    "overhead of nan": "\n".join(
        f"{line.rpartition(' ')[0]} NaN" if line.startswith("glassbox_overhead_seconds_total{") else line
        for line in PAGE.split("\n")
    ),
}  # fmt: skip


class TestPages:
    @pytest.mark.parametrize("name", HOSTILE_PAGES)
    def test_are_refused_in_one_line(self, name: str, tmp_path: Path) -> None:
        """Whatever the page says."""
        with serve_page(HOSTILE_PAGES[name]) as server:
            assert_one_line(invoke(*reading("top", server.url, tmp_path)))

    @pytest.mark.parametrize("command", SHOWN)
    def test_are_refused_by_each_command(self, command: str, tmp_path: Path) -> None:
        """The same."""
        with serve_page(HOSTILE_PAGES["rows of nan"]) as server:
            assert "can't be read" in assert_one_line(invoke(*reading(command, server.url, tmp_path)))

    @pytest.mark.parametrize("command", SHOWN)
    def test_names_give_no_orders(self, command: str, tmp_path: Path) -> None:
        """A name with all a terminal, rich, matplotlib and a browser listen to is shown as text."""
        page = page_with(NAME, escaped(NASTY + "\n")).replace('stage="', f'stage="{escaped(NASTY)}')
        page = page.replace('backend="', f'backend="{escaped(NASTY)}')
        with serve_page(page) as server:
            assert_shown(invoke(*reading(command, server.url, tmp_path)))
        if command == "baseline":
            assert_shown(invoke("baseline", "show", tmp_path / "b.npz"))

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("value", ["NaN", "+Inf", "-Inf", "1e308"])
    def test_sums_without_an_end(self, value: str, tmp_path: Path) -> None:
        """A sum may be infinite or no number, and is shown as such; what would overflow when added is refused."""
        lines = (f"{line.rpartition(' ')[0]} {value}" if "_sum{" in line else line for line in PAGE.split("\n"))
        with serve_page("\n".join(lines)) as server:
            for command in SHOWN:
                result = invoke(*reading(command, server.url, tmp_path))
                if result.exit_code:
                    assert_one_line(result)
                else:
                    assert_shown(result)
                assert (result.exit_code != 0) >= (value == "1e308")

    @pytest.mark.parametrize("command", SHOWN)
    def test_an_answer_without_an_end(self, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each ends in the time that it takes at most."""
        monkeypatch.setattr(asking.get_text, "__defaults__", (asking.NO_ACCESS, 0.5))
        monkeypatch.setattr("glassbox.view.scrape.fetch.__defaults__", (0.5, None, asking.NO_ACCESS))
        with hostile(drip(b"HTTP/1.1 200 OK\r\n\r\n", b"#\n")) as server:
            assert "did not answer within 0.5 s" in assert_one_line(invoke(*reading(command, server.url, tmp_path)))

    @pytest.mark.parametrize("command", SHOWN)
    def test_a_key(self, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each takes it as an option and from the environment, and any header."""
        args = reading(command, "URL", tmp_path)
        for options, variable in (
            (["--api-key", "k3y"], None),
            ([], "k3y"),
            (["--header", "authorization: Bearer k3y"], None),
        ):
            if variable is not None:
                monkeypatch.setenv("GLASSBOX_API_KEY", variable)
            with hostile(reply(PAGE.encode())) as server:
                assert 0 == invoke(*(server.url if arg == "URL" else arg for arg in args), *options).exit_code
            assert all("authorization: bearer k3y\r\n" in head.lower() for head in server.requests)
            monkeypatch.delenv("GLASSBOX_API_KEY", raising=False)
        assert "got no colon" in assert_one_line(invoke(*args, "--header", "s3cret"))


def lines_with(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Two lines of which the second is another one."""
    first, second = (
        write_jsonl(path, [[make_snapshot()], [make_snapshot(seed=2, engine="1")]], "head").read_text().splitlines()
    )
    window = json.loads(second)
    change(window)
    path.write_text(f"{first}\n{json.dumps(window)}\n")


def _place(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda window: window["places"][0].update(fields)


def _statistic(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda window: next(iter(window["places"][0]["statistics"].values())).update(fields)


HOSTILE_WINDOWS: dict[str, Callable[[dict[str, Any]], None]] = {
    "time": lambda window: window.update(time=1e300),
    "time of nan": lambda window: window.update(time=float("nan")),
    "window": lambda window: window.update(window_s=float("inf")),
    "steps": lambda window: window.update(steps=-1),
    "rate": lambda window: window.update(sample_rate="x"),
    "name": lambda window: window.update(model_name="x" * 10_000),
    "layer": _place(layer="0\x1b[31m"),
    "layers": _place(layer=[1]),
    "head": _place(head=-3),
    "rows": _place(rows=float("nan")),
    "negative": _place(rows=-4),
    "digits": _place(rows=10**400),
    "mean": _statistic(mean="x", count=10**12),
    "list": _statistic(mean=[1], count=10**12),
    "buckets": _statistic(buckets=[[1]] * 12),
    "infinite": _statistic(buckets=[float("inf")] * 12),
    "no places": lambda window: window.update(places=[None]),
}  # fmt: skip


class TestFiles:
    @pytest.mark.parametrize("name", HOSTILE_WINDOWS)
    def test_a_line_that_says_what_can_t_be(self, name: str, tmp_path: Path) -> None:
        """It is left out and counted; the others are read."""
        path = tmp_path / "run.jsonl"
        lines_with(path, HOSTILE_WINDOWS[name])
        run = windows.read_run([path])
        assert (1, 1) == (run.lines, run.unreadable)

    @pytest.mark.parametrize(
        "line",
        ["[" * 100_000, '{"a":' * 50_000, '{"time": ' + "9" * 5000 + "}", "null", '"x"', "\x1b[31m", "NaN", "{}"],
        ids=range(8),
    )
    def test_a_file_of_such_lines(self, line: str, tmp_path: Path) -> None:
        """It is refused in one line."""
        path = tmp_path / "run.jsonl"
        path.write_text(f"{line}\n" * 3)
        for args in of_files(path, tmp_path):
            assert "has 3 lines, none of them a window" in assert_one_line(invoke(*args))

    def test_places_that_multiply(self, tmp_path: Path) -> None:
        """500 layers and 500 heads are 250,000 places, and no model."""
        path = write_jsonl(tmp_path / "run.jsonl", [[make_snapshot()]], "head")
        window = json.loads(path.read_text())
        window["places"] = [{**window["places"][0], "layer": n, "head": n} for n in range(500)]
        path.write_text(json.dumps(window))
        for args in of_files(path, tmp_path):
            assert "500 layers of 500 heads are those of no model" in assert_one_line(invoke(*args))

    def test_a_long_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is passed over in parts; what comes after it is read."""
        monkeypatch.setattr(windows, "MAX_LINE_BYTES", 1 << 20)
        path = write_jsonl(tmp_path / "run.jsonl", [[make_snapshot()]], "head")
        path.write_text("x" * (5 << 20) + "\n" + path.read_text())
        run = windows.read_run([path])
        assert (1, 1) == (run.lines, run.unreadable)

    def test_names_give_no_orders(self, tmp_path: Path) -> None:
        """As of a page; nor in the report, where they are no markup."""
        path = tmp_path / "run.jsonl"
        write_jsonl(path, [[make_snapshot(model_name=NASTY, engine=NASTY)]], "head")
        for args in of_files(path, tmp_path):
            assert_shown(invoke(*args))
        page = (tmp_path / "r.html").read_text()
        assert not {"\x1b", "\u202e", "\x00", "<script>"} & {part for part in (*page, "<script>") if part in page}

    @pytest.mark.parametrize("kind", ["missing", "directory", "pipe", "socket", "endless", "loop", "long", "too large"])
    def test_what_is_no_file(self, kind: str, tmp_path: Path) -> None:
        """Nothing waits for a writer or reads without an end."""
        path = tmp_path / ("x" * 300 if kind == "long" else "x")
        with socket.socket(socket.AF_UNIX) as bound:
            make: dict[str, Callable[[], object]] = {
                "directory": path.mkdir,
                "pipe": lambda: os.mkfifo(path),
                "socket": lambda: bound.bind(str(path)),
                "endless": lambda: path.symlink_to("/dev/zero"),
                "loop": lambda: path.symlink_to("x"),
                "too large": lambda: (path.touch(), os.truncate(path, windows.MAX_FILE_BYTES + 1)),
            }
            make.get(kind, lambda: None)()
            for args in of_files(path, tmp_path):
                assert "can't read " in assert_one_line(invoke(*args))
            if kind != "directory":
                assert_one_line(invoke("check", "--model", path))
            assert_one_line(invoke("check", path))
            assert_one_line(invoke("baseline", "show", path))

    @pytest.mark.parametrize(
        "config", ["[" * 100_000, '{"text_config":' * 20_000, "9" * 5000, '{"num_hidden_layers": 1e9}', "\x1b[31m",
                   '{"num_hidden_layers": 10000000000, "num_attention_heads": 3}', '{"layer_types": null}'],
        ids=range(7),
    )  # fmt: skip
    def test_models(self, config: str, tmp_path: Path) -> None:
        """A folder's config.json."""
        (tmp_path / "config.json").write_text(config)
        assert "use --layers and --heads" in assert_one_line(invoke("check", "--model", tmp_path))


@contextmanager
def changed_baseline(path: Path, **changes: Any) -> Iterator[Path]:
    """A good file with other entries in its archive."""
    save_baseline(path, from_engines(merge([make_snapshot()]), "here"))
    with np.load(path) as archive:
        entries = {name: archive[name] for name in archive.files}
    meta = json.loads(bytes(entries["meta"]).decode())
    meta.update({name: value for name, value in changes.items() if name not in entries})
    entries |= {name: value for name, value in changes.items() if name in entries}
    entries["meta"] = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    with path.open("wb") as file:
        np.savez_compressed(file, **entries)
    yield path


class TestBaselines:
    @pytest.mark.parametrize(
        "changes",
        [
            {"time_s": 1e300},
            {"time_s": "x"},
            {"duration_s": float("nan")},
            {"num_heads": -1},
            {"layers": "x"},
            {"layers": []},
            {"build": 3},
            {"rows": np.zeros(3)},
            {"rows": np.array(["x"])},
            {"counts": np.full((1,), np.nan)},
            {"format_version": "\x1b[31m"},
        ],
        ids=str,
    )
    @pytest.mark.filterwarnings("error")
    def test_that_say_what_can_t_be(self, changes: dict[str, Any], tmp_path: Path) -> None:
        """Refused in one line."""
        with changed_baseline(tmp_path / "b.npz", **changes) as path:
            assert_one_line(invoke("baseline", "show", path))

    def test_names_give_no_orders(self, tmp_path: Path) -> None:
        """Model, source and versions."""
        nasty = {"model_name": NASTY, "source": NASTY, "build": {NASTY: NASTY}}
        with changed_baseline(tmp_path / "b.npz", **nasty) as path:
            assert_shown(invoke("baseline", "show", path))

    def test_a_bomb(self, tmp_path: Path) -> None:
        """A megabyte that says it unpacks to a gigabyte, and one that says it doesn't."""
        path = tmp_path / "b.npz"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("counts.npy", "w") as file:
            for _ in range(1 << 9):
                file.write(b"\0" * (1 << 20))
        assert "must unpack to at most" in assert_one_line(invoke("baseline", "show", path))

    @pytest.mark.parametrize(
        "content", [b"", b"PK\x05\x06" + b"\0" * 18, b"\x93NUMPY\x01\0", b"\x1b[31m", os.urandom(3000)]
    )
    def test_that_are_none(self, content: bytes, tmp_path: Path) -> None:
        """Empty, an empty archive, half an array, noise."""
        path = tmp_path / "b.npz"
        path.write_bytes(content)
        assert_one_line(invoke("baseline", "show", path))


def start(*args: str, **options: Any) -> "subprocess.Popen[str]":
    # A shell's background job ignores SIGINT, and so does whatever it starts; nobody's terminal is like that.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "glassbox.cli", *args]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


class TestProcesses:
    def test_nobody_reads(self, tmp_path: Path) -> None:
        """A pipe that is closed at its other end, as by `| head -1`, ends a command without a word."""
        path = write_jsonl(tmp_path / "run.jsonl", [[make_snapshot()]], "head")
        for args in (["diff", str(path), str(path), "--min-rows", "1"], ["check"]):
            reader, writer = os.pipe()
            os.close(reader)
            process = start(*args, stdout=writer)
            os.close(writer)
            _, errors = process.communicate(timeout=180)
            assert 0 != process.returncode
            assert "Traceback" not in errors

    def test_an_interrupt(self) -> None:
        """Ctrl-C while a server drips ends the command at once, with a status and without a traceback."""
        asked = threading.Event()

        def answer(server: Any, connection: socket.socket) -> None:
            asked.set()
            drip(b"HTTP/1.1 200 OK\r\n\r\n", b"#\n")(server, connection)

        with hostile(answer) as server:
            process = start("top", "--once", server.url, stdout=subprocess.PIPE)
            assert asked.wait(180)
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
        assert 0 != process.returncode
        assert "Traceback" not in errors + output
