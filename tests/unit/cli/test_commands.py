"""Commands at their edges: counting series, bad servers, help, completion, and what is imported for what."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from glassbox.cli.commands.model_shape import ModelShape, read_shape
from glassbox.cli.main import main
from glassbox.export.families import adapter_series_count, effective_detail, series_count
from glassbox.store.merge import merge
from glassbox.view.measured import ViewError
from tests.export_samples import make_snapshot
from tests.metrics_pages import VLLM_LINES, metrics_page, serve_page


def invoke(*args: object, **kwargs: Any) -> Any:
    return CliRunner().invoke(main, [str(arg) for arg in args], **kwargs)


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


class TestTurns:
    def test_layers_that_keep_the_rate(self, tmp_path: Path) -> None:
        """How many steps that takes, and of which layers it is so."""
        path = write(tmp_path / "a.yaml", "sampling: {layers_per_step: 4, layers: {every: 2}}\n")
        of_shape, assumed = invoke("check", path, "--layers", 80, "--heads", 4).stdout, invoke("check", path).stdout
        turns = (
            "# A measured step measures 4 of 40 layers in turn (sampling.layers_per_step): 10 % of steps are measured, "
        )
        assert f"{turns}so that each layer keeps sample_rate 0.01.\n" in of_shape
        assert "4 of 16 layers in turn" in assumed
        assert "sample_rate 0.01 (as of an 8B model; for yours use" in assumed

    def test_a_rate_that_cannot_be_kept(self, tmp_path: Path) -> None:
        """It is no error: what it comes to, and what helps."""
        path = write(tmp_path / "a.yaml", "{sample_rate: 0.5, sampling: {layers_per_step: 4}}\n")
        text = invoke("check", path, "--layers", 32, "--heads", 4).stdout
        assert "# sample_rate 0.5 can't be kept with sampling.layers_per_step 4 of 32 layers: every step is " in text


class TestSeries:
    def test_counts_are_those_of_a_page(self, tmp_path: Path) -> None:
        """As many as there are samples of attention and KV cache on the page of such a server."""
        text = invoke("check", "--layers", 3, "--heads", 4, "--engines", 2).stdout
        engines = [make_snapshot(layers=(0, 1, 2), heads=4, engine=engine) for engine in ("0", "1")]
        for detail in ("model", "layer", "head"):
            page = metrics_page(engines, detail)  # type: ignore[arg-type]
            samples = sum(line.startswith(("glassbox_attention_", "glassbox_kv_cache_")) for line in page.splitlines())
            shown = next(line.split()[3] for line in text.splitlines() if f"detail {detail}" in line)
            assert f"{samples:,}" == shown

    def test_the_detail_in_effect_is_the_servers(self, tmp_path: Path) -> None:
        """With the server's own warning when it isn't the wanted one."""
        settings = "export: {prometheus: {detail: head, max_series: 2000}}\n"
        path = write(tmp_path / "a.yaml", settings)
        text = invoke("check", path, "--layers", 3, "--heads", 4).stdout
        engines = merge([make_snapshot(layers=(0, 1, 2), heads=4)])
        detail, warning = effective_detail("head", 2000, engines)
        assert ("layer", True) == (detail, series_count("head", (4, 4, 4)) > 2000)
        assert f"# Falls back: {warning}" in text
        (line,) = [line for line in text.splitlines() if "in effect" in line]
        assert "detail layer" in line

    def test_those_of_adapters_are_told(self, tmp_path: Path) -> None:
        """At every detail, and that they are among them."""
        plain, apart = (
            invoke("check", write(tmp_path / "a.yaml", f"adapters: {{max: {limit}}}\n"), "--engines", 2).stdout
            for limit in (0, 8)
        )
        besides = 2 * adapter_series_count(10)
        assert f"Of each, {besides:,} by adapter (8 LoRA adapters, the base model and other)." in apart
        assert "by adapter" not in plain
        for detail in ("model", "layer", "head"):
            without, with_them = (
                int(next(line.split()[3] for line in text.splitlines() if f"detail {detail}" in line).replace(",", ""))
                for text in (plain, apart)
            )
            assert with_them == without + besides

    def test_without_a_model_says_for_which(self) -> None:
        """An assumption is named, with the options that replace it."""
        text = invoke("check").stdout
        assert (
            "32 layers x 32 heads, 1 engine (as of an 8B model; for yours use --model, or --layers and --heads):"
            in text
        )

    def test_nothing_is_shown_where_prometheus_is_off(self, tmp_path: Path) -> None:
        """The count says so."""
        path = write(tmp_path / "a.yaml", "export: {prometheus: {enabled: false}}\n")
        assert "# None of them is shown" in invoke("check", path).stdout
        path = write(tmp_path / "b.yaml", "export: {prometheus: {on_vllm_port: false}}\n")
        assert "# None of them is shown: export.prometheus.on_vllm_port is false" in invoke("check", path).stdout
        path = write(tmp_path / "c.yaml", "export: {prometheus: {on_vllm_port: false, port: 9464}}\n")
        assert "# None of them is shown" not in invoke("check", path).stdout

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--layers", "3"], "--layers and --heads must be given together"),
            (["--model", ".", "--layers", "3", "--heads", "1"], "--model tells layers and heads"),
            (["--model", "nowhere"], "can't read nowhere: No such file or directory; --model needs the folder"),
        ],
    )
    def test_options_that_make_no_sense(self, args: list[str], message: str) -> None:
        """One line, status 1."""
        result = invoke("check", *args)
        assert (1, "", 1) == (result.exit_code, result.stdout, len(result.stderr.splitlines()))
        assert message in result.stderr


class TestModelShape:
    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            ({"num_hidden_layers": 30, "num_attention_heads": 9}, ModelShape(30, 9)),
            ({"n_layer": 12, "n_head": 12}, ModelShape(12, 12)),
            ({"text_config": {"num_hidden_layers": 48, "num_attention_heads": 40}}, ModelShape(48, 40)),
            (
                {"thinker_config": {"text_config": {"num_hidden_layers": 28, "num_attention_heads": 16}}},
                ModelShape(28, 16),
            ),
            (
                {
                    "num_hidden_layers": 4,
                    "num_attention_heads": 2,
                    "layer_types": ["linear_attention", "full_attention", "sliding_attention", "linear_attention"],
                },
                ModelShape(2, 2),
            ),
            (
                {
                    "num_hidden_layers": 3,
                    "num_attention_heads": 2,
                    "layers_block_type": ["mamba", "attention", "mamba"],
                },
                ModelShape(1, 2),
            ),
            ({"num_hidden_layers": 4, "num_attention_heads": 8, "hybrid_override_pattern": "M*M-"}, ModelShape(1, 8)),
            ({"num_hidden_layers": 2, "num_attention_heads": [4, 8]}, ModelShape(2, 8)),
        ],
    )
    def test_of_the_forms_there_are(self, config: Any, expected: ModelShape, tmp_path: Path) -> None:
        """Old names, nested language models, hybrids of which only attention layers count."""
        assert expected == read_shape(write(tmp_path / "config.json", config).parent)

    def test_agrees_with_transformers(self, tmp_path: Path) -> None:
        """For configurations that transformers writes."""
        transformers = pytest.importorskip("transformers")
        for config in (transformers.LlamaConfig(num_hidden_layers=5), transformers.GPT2Config(n_layer=7)):
            config.save_pretrained(tmp_path)
            assert ModelShape(config.num_hidden_layers, config.num_attention_heads) == read_shape(tmp_path)

    @pytest.mark.parametrize("config", ["{", "[]", "{}", '{"num_hidden_layers": "many", "num_attention_heads": 3}'])
    def test_what_tells_nothing(self, config: str, tmp_path: Path) -> None:
        """The remedy is to say it oneself."""
        with pytest.raises(ViewError, match="use --layers and --heads"):
            read_shape(write(tmp_path / "config.json", config))


class TestTop:
    def test_one_frame_for_a_pipe(self) -> None:
        """Without --once too, where there is no terminal; no colours, all layers."""
        with serve_page(metrics_page([make_snapshot(layers=tuple(range(50)))], "layer")) as server:
            for args in ([], ["--once"]):
                result = invoke("top", server.url, *args)
                assert (0, False) == (result.exit_code, "\x1b" in result.stdout)
                assert 50 == sum(line[:1].isdigit() for line in result.stdout.splitlines())

    @pytest.mark.parametrize(
        ("body", "args", "message"),
        [
            (VLLM_LINES, [], "has no metrics of glassbox"),
            ("<html></html>", [], "has no metrics of glassbox"),
            (metrics_page([make_snapshot()], "layer"), ["--engine", "3"], "has no engine '3'; it has 0"),
            (metrics_page([make_snapshot()], "layer"), ["--sort", "size"], "--sort must be one of layer, rows"),
            (metrics_page([make_snapshot()], "layer"), ["--statistic", "x"], "statistic must be one of entropy_ratio"),
            (metrics_page([make_snapshot()], "layer"), ["--statistic", "self_logprob"], "self_logprob is in no metric"),
        ],
    )
    def test_errors_are_one_line(self, body: str, args: list[str], message: str) -> None:
        """Status 1, on stderr."""
        with serve_page(body) as server:
            result = invoke("top", server.url, *args)
        assert (1, "", 1) == (result.exit_code, result.stdout, len(result.stderr.splitlines()))
        assert message in result.stderr


class TestHelp:
    @pytest.mark.parametrize("command", ["check", "top", "heads", "heatmap", "report", "diff"])
    def test_has_examples_and_exit_status(self, command: str) -> None:
        """Examples stand in lines of their own, in 80 columns."""
        text = invoke(command, "--help", env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}).stdout
        lines = [line.strip() for line in text.splitlines()]
        examples = lines[lines.index("Examples:") + 1 :]
        assert sum(line.startswith(f"glassbox {command}") for line in examples) >= 2
        assert "xit status" in text

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["hea"], ["heads", "heatmap"]),
            (["diff", "a", "b", "--fail"], ["--fail-above"]),
            (["heatmap", "--statistic", "s"], ["sink_ratio"]),
            (["top", "--phase", "pre"], ["prefill"]),
            (["top", "--sort", "non"], ["nonfinite"]),
        ],
    )
    def test_bash_completes_commands_options_and_statistics(
        self, words: list[str], expected: list[str], tmp_path: Path
    ) -> None:
        """With the script that `--show-completion` prints, run by a real bash."""
        bash = shutil.which("bash")
        if bash is None:
            pytest.skip("needs bash")
        command = tmp_path / "glassbox"
        code = 'from glassbox.cli.main import main; main(prog_name="glassbox")'
        command.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-c", code])} "$@"\n')
        command.chmod(0o755)
        line = " ".join(shlex.quote(word) for word in ("glassbox", *words))
        program = (
            'eval "$(glassbox --show-completion bash)"; '
            f"COMP_WORDS=({line}); COMP_CWORD={len(words)}; _glassbox_completion glassbox; "
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        path = f"{tmp_path}:{os.environ['PATH']}"
        done = subprocess.run(
            [bash, "-c", program], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
        )
        assert (expected, "") == (done.stdout.split(), done.stderr)

    def test_version_needs_no_plots(self) -> None:
        """Nor does any other command until it draws; `version` not even numpy."""
        code = (
            "import sys\nfrom typer.testing import CliRunner\nfrom glassbox.cli.main import main\n"
            "CliRunner().invoke(main, ['version'])\n"
            "sys.exit(' '.join({'matplotlib', 'numpy', 'httpx', 'jinja2', 'yaml'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "" == done.stderr.strip()

    @pytest.mark.parametrize("command", ["heatmap", "report"])
    def test_without_the_extra_says_which(self, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """One line with the command that installs it."""
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else object())
        result = invoke(command, "run.jsonl")
        assert (1, "", 1) == (result.exit_code, result.stdout, len(result.stderr.splitlines()))
        assert "needs matplotlib; install the extra `plots`: pip install 'vllm-glassbox[plots]'" in result.stderr
