"""Probes in the YAML: valid means usable, at the start, at an edit and in `glassbox check`."""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from glassbox.cli.commands.check_focus import check_has, focus_lines
from glassbox.cli.commands.check_probes import check_fit, probe_lines
from glassbox.cli.main import main
from glassbox.config.follow import ConfigFollower
from glassbox.config.load import ConfigError, GlassboxConfig, load_config, parse_config
from glassbox.config.usable import load_usable
from glassbox.core.trace_options import TraceOptions
from glassbox.signals.focus_heads import FocusHead, FocusHeads, write_focus_heads
from glassbox.signals.needs import sampled_options
from glassbox.signals.probe import ProbeFeature
from glassbox.signals.probe_files import ProbeFiles, require_probes
from glassbox.view.measured import ViewError
from tests import probe_samples


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "glassbox.yaml"


def problem(file: Path, probes: object, **more: Any) -> str:
    """What is said of the list, without the file's name."""
    file.write_text(yaml.safe_dump({"probes": probes, **more}))
    with pytest.raises(ConfigError) as caught:
        load_usable(file, also=require_probes)
    text = str(caught.value)
    assert "\n" not in text
    return text.removeprefix(f"{file}: ")


class TestValid:
    @pytest.mark.parametrize(
        ("written", "said"),
        [
            (
                "[{}]",
                "probes.0.file must be the path of a probe's file, got nothing; write probes: [{file: probe.json}]",
            ),
            ("[{file: a}, {file: 3}]", "probes.1.file must be the path of a probe's file, got 3; write"),
            ("[{file: a, threshold: 3}]", "probes.0.threshold must be between 0 and 1, or null, got 3; write"),
            ("[{file: a, treshold: 1}]", "probes.0.treshold is not a known key; did you mean probes.0.threshold?"),
            ("[a.json]", "probes.0 must be a mapping, got the string 'a.json'; write [{file: probe.json}], or []"),
            ("a.json", "probes must be a list of at most 16 probes, got the string 'a.json'; write"),
            ("[{file: a}, {file: a}]", "probes must name each file once, not 'a' twice"),
            (f"[{', '.join(f'{{file: p{n}}}' for n in range(17))}]", "probes must be a list of at most 16 probes, got"),
        ],
    )
    def test_one_line_for_each_mistake(self, written: str, said: str) -> None:
        """Of a list's item, too: which, its rule, its value and what to write."""
        with pytest.raises(ConfigError) as caught:
            parse_config(Path("x.yaml"), f"probes: {written}".encode())
        assert str(caught.value).startswith(f"x.yaml: {said}")

    @pytest.mark.parametrize("signals", ["[spectral, spectral]", "[spectrum]", "spectral"])
    def test_signals_are_those_of_the_table(self, signals: str) -> None:
        """Each once."""
        with pytest.raises(ConfigError, match=r"requests\.signals must "):
            parse_config(Path("x.yaml"), f"requests: {{signals: {signals}}}".encode())


class TestUsable:
    def test_a_file_that_is_none(self, file: Path, tmp_path: Path) -> None:
        """Missing, of another kind, or broken: the reader says what of it."""
        assert "can't be read (No such file or directory)" in problem(file, [{"file": "/nowhere/p.json"}])
        (tmp_path / "p.json").write_text("{}")
        said = problem(file, [{"file": f"{tmp_path}/p.json"}])
        assert said.startswith("probes.0.file must be a probe's file, got ")
        assert said.endswith("; name one that glassbox train wrote, or use probes: []")

    def test_a_file_that_everybody_may_write_to(self, file: Path, tmp_path: Path) -> None:
        """Another user of the host would decide whose requests are ended."""
        path = probe_samples.write(tmp_path)
        path.chmod(0o666)
        assert "must not be writable by everybody, got mode 0666; use chmod o-w" in problem(file, [{"file": str(path)}])
        path.chmod(0o664)
        load_usable(file, also=require_probes)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file of another user")
    def test_a_file_of_another_user(self, file: Path, tmp_path: Path) -> None:
        """The same where everybody may put one, whatever its mode; a file of root's is good for every user."""
        path = probe_samples.write(tmp_path)
        os.chown(path, 12345, -1)
        tmp_path.chmod(0o1777)
        told = problem(file, [{"file": str(path)}])
        assert f"must belong to user 0 or root in {tmp_path}, where everybody may put files, got user 12345; " in told
        assert "move it, or use chown 0" in told
        errors: list[str] = []
        config = GlassboxConfig.model_validate({"probes": [{"file": str(path)}]})
        files = ProbeFiles(lambda: config, errors.append)
        assert () == files.current()
        assert 1 == len(errors)
        os.chown(path, 0, -1)  # as the message says: it is looked at again
        assert 1 == len(files.current())
        load_usable(file, also=require_probes)
        for folder in (tmp_path, *tmp_path.parents):
            if folder == Path(tempfile.gettempdir()):
                break
            folder.chmod(0o755)
        os.seteuid(65534)
        try:
            load_usable(file, also=require_probes)
        finally:
            os.seteuid(0)

    @pytest.mark.parametrize("kind", ["pipe", "device", "folder", "endless", "numbers", "nested"])
    def test_a_file_that_is_a_trap(self, kind: str, file: Path, tmp_path: Path) -> None:
        """Nothing is waited for, and no more is read or believed than a probe can have."""
        path = tmp_path / "p.json"
        text = probe_samples.write(tmp_path).read_text()
        match kind:
            case "pipe":
                os.mkfifo(path)
            case "device":
                path.symlink_to("/dev/full")
            case "folder":
                path.mkdir()
            case "endless":
                path.write_bytes(b" " * (5 << 20))
            case "numbers":
                path.write_text(text.replace('"intercept": 0.2', '"intercept": NaN'))
            case "nested":
                path.write_text("[" * 200_000)
        said = {
            "pipe": "a pipe or a device",
            "device": "a pipe or a device",
            "folder": "Is a directory",
            "endless": "is larger than 4 MB",
            "numbers": "intercept must be a number from",
            "nested": "nested too deeply",
        }
        assert said[kind] in problem(file, [{"file": str(path)}])

    def test_two_of_a_name(self, file: Path, tmp_path: Path) -> None:
        """Their scores could not be told apart."""
        (tmp_path / "other").mkdir()
        paths = [probe_samples.write(folder) for folder in (tmp_path, tmp_path / "other")]
        said = problem(file, [{"file": str(path)} for path in paths])
        assert "probes.1.file must be probes of different names, got drift in" in said

    def test_an_edit(self, file: Path, tmp_path: Path) -> None:
        """One that names no probe keeps what is in force; one of something else doesn't look at the probes again."""
        path = probe_samples.write(tmp_path)
        file.write_text(f"probes: [{{file: {path}}}]")
        errors: list[str] = []
        follower = ConfigFollower(
            file,
            lambda config: None,
            lambda error: errors.append(str(error)),
            initial=load_config(file),
            also=require_probes,
        )
        follower.look()
        file.write_text("probes: [{file: /nowhere/p.json}]")
        follower.look()
        assert follower.current is not None
        assert (1, [str(path)]) == (len(errors), [probe.file for probe in follower.current.probes])
        path.unlink()
        file.write_text(f"{{sample_rate: 0.5, probes: [{{file: {path}}}]}}")
        follower.look()
        assert (True, 0.5) == (follower.status.successful, follower.current.sample_rate)


class TestCheck:
    def checked(self, file: Path) -> str:
        result = CliRunner().invoke(main, ["check", str(file)])
        assert 0 == result.exit_code, result.output
        return result.stdout

    def test_what_it_makes_the_server_measure(self, file: Path, tmp_path: Path) -> None:
        """Layers and heads of the probe and no others, and the series that come on top."""
        file.write_text(f"{{probes: [{{file: {probe_samples.write(tmp_path)}}}], requests: {{trace_rate: 0.01}}}}")
        said = self.checked(file)
        assert "Probe drift ('lost' from 0.5 on): 2 features, trained on 100 samples of tiny/model" in said
        assert "kept: layers 0, heads 0, 1, signals none, sampled rows of the prompt" in said
        assert "Of each, 44 of probes and signals." in said
        assert load_config(file).probes[0].file in said

    def test_a_threshold_of_its_own(self, file: Path, tmp_path: Path) -> None:
        """And without a trace rate: who is scored."""
        file.write_text(f"probes: [{{file: {probe_samples.write(tmp_path)}, threshold: 0.75}}]")
        said = self.checked(file)
        assert "('lost' from 0.75 on)" in said
        assert "requests.trace_rate is 0" in said

    def test_signals_of_no_request(self, file: Path) -> None:
        """Named without a rate that chooses requests: nothing is computed, and that is said."""
        file.write_text("requests: {signals: [spectral, rauq]}")
        told = "Signals spectral, rauq (requests.signals) are computed of no request"
        assert told in self.checked(file)
        file.write_text("requests: {signals: [spectral, rauq], trace_rate: 0.01}")
        assert told not in self.checked(file)

    def test_of_spans(self, file: Path, tmp_path: Path) -> None:
        """Only a client knows them."""
        features = (ProbeFeature("prompt_span.system_L1_H0", 0.5, 0.1, 1.0),)
        file.write_text(f"probes: [{{file: {probe_samples.write(tmp_path, features=features)}}}]")
        assert "spans system: only of requests whose client names them in glassbox_spans" in self.checked(file)

    def test_on_demand_over_the_bound(self, file: Path) -> None:
        """Of a probe's union of layers and heads; and of the whole model, if it is known."""
        features = tuple(ProbeFeature(f"tracker_sigma2_L{n}_H{n}", 0.5, 0.1, 1.0) for n in range(6))
        config = GlassboxConfig.model_validate({"requests": {"trace_rate": 1}})
        lines = list(probe_lines(config, [probe_samples.make_probe(features=features)]))
        assert lines[-1].startswith("  tracker have no value of these: signals on demand are for at most 32 layers x")
        assert "and 36 are kept" in lines[-1]
        some = dict.fromkeys(range(4), 8)  # of these six layers the model has four
        assert "are kept: " in list(probe_lines(config, [probe_samples.make_probe(features=features)], some))[-1]
        whole = GlassboxConfig.model_validate({"requests": {"trace_rate": 1, "signals": ["cyclic"]}})
        assert "cyclic have no value of these" in list(probe_lines(whole, (), dict.fromkeys(range(30), 9)))[-1]
        assert "and 270 are kept" in list(probe_lines(whole, (), dict.fromkeys(range(30), 9)))[-1]

    def test_of_another_model(self) -> None:
        """A probe that reads a layer or head which the model lacks is refused, with --model."""
        probes = [probe_samples.make_probe(features=(ProbeFeature("answer_entropy_ratio_L7_H3", 0.5, 0.1, 1.0),))]
        check_fit(probes, "m", range(8), 4)
        for layers, heads, lacking in (
            (range(7), 4, "got layer 7"),
            (range(8), 3, "got head 3"),
            ((0, 2), 4, "layer 7"),
        ):
            with pytest.raises(ViewError, match=lacking):
                check_fit(probes, "m", layers, heads)


class TestFocusHeads:
    FOUND = FocusHeads("small", 4.0, 10, 12, (FocusHead(9, 3, 5.5), FocusHead(4, 5, 4.5), FocusHead(9, 1, 4.2)))

    def test_what_check_says(self, file: Path, tmp_path: Path) -> None:
        """Which heads, of what they were found, and what a request needs to have a focus."""
        write_focus_heads(tmp_path / "heads.json", self.FOUND)
        file.write_text(f"requests: {{focus_heads: {tmp_path / 'heads.json'}}}")
        result = CliRunner().invoke(main, ["check", str(file)])
        assert 0 == result.exit_code
        lines = [line.removeprefix("# ") for line in result.stdout.splitlines()]
        at = lines.index(
            "The signal focus (Attention Tracker) is taken over 3 heads of layers 4, 9, found with small: over 10 "
            "normal and 12 attacked prompts their focus falls by more than 4 standard deviations"
        )
        assert lines[at + 1].startswith("  a client asks with glassbox_signals: [focus], and glassbox_spans")

    def test_why_it_can_not_run(self) -> None:
        """Requests without a span, a row that isn't measured, clients that may not ask."""
        config = GlassboxConfig.model_validate(
            {
                "sampling": {"prefill_rows_per_request": 0},
                "requests": {"opt_in": False, "signals": ["focus"], "trace_rate": 1},
            }
        )
        text = "\n".join(focus_lines(config, None, None))
        for reason in ("is taken over all traced heads", "these name no span", "opt_in is false", "per_request is 0"):
            assert reason in text
        assert [] == list(focus_lines(GlassboxConfig(), None, None))

    def test_with_a_model(self) -> None:
        """Heads that it lacks are counted; with none of them the signal never has a value, which is an error."""
        check_has(self.FOUND, "m", {4: 8})
        lines = list(focus_lines(GlassboxConfig(), self.FOUND, {4: 8, 9: 2}))
        assert lines[1].startswith("  1 of them are left out: this model has no such heads, or sampling.layers")
        assert not any("left out" in line for line in focus_lines(GlassboxConfig(), self.FOUND, {4: 8, 9: 4}))
        check_has(None, "m", {})
        with pytest.raises(ViewError, match="it has none of the 3 of small; run glassbox heads with this model"):
            check_has(self.FOUND, "m", {3: 32, 4: 5})


class TestNeeds:
    def test_the_union_and_no_more(self) -> None:
        """Layers and heads of all probes."""
        other = (ProbeFeature("answer_sink_ratio_L4_H2", 0.5, 0.1, 1.0),)
        probes = [probe_samples.make_probe(), probe_samples.make_probe("other", features=other)]
        assert TraceOptions(layers=(0, 4), heads=(0, 1, 2)) == sampled_options(probes, ())

    def test_signals_are_of_all_layers(self) -> None:
        """What the YAML asks for is not narrowed by a probe; a signal brings the rows that it needs."""
        probes = [probe_samples.make_probe()]
        assert TraceOptions(signals=("spectral",), prompt="all") == sampled_options(probes, ("spectral",))
        assert TraceOptions(signals=("rauq",)) == sampled_options((), ("rauq",))
        assert TraceOptions() == sampled_options((), ())
