"""`register()` attaches once, refuses bad files and lets no exception reach vLLM; `unregister()` takes it all back."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from glassbox.adapter import internals, release
from glassbox.adapter import overrides as overrides_module
from glassbox.adapter.seat import SEAT
from glassbox.config.load import SUPPORTED_INNER_BACKENDS
from glassbox.core.kill_switch import is_disabled
from glassbox.plugin import register
from glassbox.processes.api_server import shown_metrics
from glassbox.processes.registration import unregister
from glassbox.store import rundir
from glassbox.store.ownership import OWNER_ENV
from tests.broken_configs import BROKEN, Broken
from tests.other_process import OtherProcess

registry = pytest.importorskip("vllm.v1.attention.backends.registry", reason="needs vLLM")
Backend = registry.AttentionBackendEnum


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A good file, no run directory yet, and nothing registered afterwards."""
    for name in (rundir.RUN_DIR_ENV, "GLASSBOX_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GLASSBOX_CONFIG", str(tmp_path / "glassbox.yaml"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "glassbox.yaml").write_text("sample_rate: 0.5\n")
    unregister()
    yield
    unregister()


@pytest.fixture
def log() -> Iterator[list[logging.LogRecord]]:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("glassbox")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def overrides() -> dict[str, str]:
    return {member.name: member.get_path() for member in Backend if member.is_overridden()}


def attached() -> bool:
    return bool(overrides()) or hasattr(Backend, "get_config") or SEAT.settings is not None


class TestKillSwitch:
    @pytest.mark.parametrize(
        ("value", "disabled"), [("1", True), ("true", True), ("yes", True), ("0", False), ("", False), ("off", False)]
    )
    def test_values(self, value: str, disabled: bool) -> None:
        """GLASSBOX_DISABLE=1; 0 and the like do not disable."""
        assert disabled is is_disabled({"GLASSBOX_DISABLE": value})

    def test_not_set(self) -> None:
        """Glassbox runs."""
        assert is_disabled({}) is False

    def test_loads_nothing(self) -> None:
        """vLLM imports the entry point's module; disabled, that and the switch is all it ever loads."""
        program = (
            "import sys; before = set(sys.modules); from glassbox.plugin import register; register();"
            "print(sorted(m for m in set(sys.modules) - before if m.split('.')[0] not in sys.stdlib_module_names))"
        )
        environment = {**os.environ, "GLASSBOX_DISABLE": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
        out = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
        assert (
            out.stdout.decode().strip()
            == "['glassbox', 'glassbox.adapter', 'glassbox.adapter.ray_environment', 'glassbox.core', "
            "'glassbox.core.kill_switch', 'glassbox.plugin']"
        )

    def test_reaches_workers_of_ray(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Disabled in the process that starts them, it is in them as well; nothing is attached."""
        from vllm.ray.ray_env import DEFAULT_ENV_VAR_PREFIXES, get_env_vars_to_copy

        monkeypatch.setenv("GLASSBOX_DISABLE", "1")
        try:
            register()
            assert "GLASSBOX_DISABLE" in get_env_vars_to_copy()
            assert not attached()
        finally:
            DEFAULT_ENV_VAR_PREFIXES.discard("GLASSBOX_")


class TestRegister:
    def test_attaches(self) -> None:
        """All supported members are overridden, CUSTOM is the router, the configuration is in vLLM's registry."""
        register()
        assert overrides() == {
            "CUSTOM": "glassbox.adapter.attention.router.GlassboxBackend",
            **{name: f"glassbox.adapter.attention.observed.Observed{name}" for name in SUPPORTED_INNER_BACKENDS},
        }
        assert registry.get_backend_config(Backend.CUSTOM)["sample_rate"] == 0.5
        settings = SEAT.settings
        assert settings is not None
        assert settings.config.sample_rate == 0.5

    def test_twice(self) -> None:
        """The second call changes nothing, not even if the file has changed since."""
        register()
        settings, before = SEAT.settings, overrides()
        Path(os.environ["GLASSBOX_CONFIG"]).write_text("sample_rate: 3\n")
        register()
        assert SEAT.settings is settings
        assert before == overrides()

    def test_a_file_of_the_working_directory_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """For workers in other directories, as Ray's; the packaged one they find themselves."""
        monkeypatch.delenv("GLASSBOX_CONFIG")
        monkeypatch.chdir(tmp_path)
        register()
        assert os.environ["GLASSBOX_CONFIG"] == str(tmp_path / "glassbox.yaml")
        unregister()
        assert "GLASSBOX_CONFIG" not in os.environ
        (tmp_path / "glassbox.yaml").unlink()
        register()
        assert "GLASSBOX_CONFIG" not in os.environ

    def test_variables_reach_workers_of_ray(self) -> None:
        """Those that say where the configuration and the run directory are; as long as glassbox is registered."""
        from vllm.ray.ray_env import get_env_vars_to_copy

        names = {"GLASSBOX_CONFIG", "GLASSBOX_RUN_DIR"}
        register()
        assert names <= get_env_vars_to_copy()
        unregister()
        assert not names & get_env_vars_to_copy()

    def test_attach_custom(self) -> None:
        """Only the CPU's, whose platform never asks CUSTOM, are overridden; what they stand for is decided later."""
        Path(os.environ["GLASSBOX_CONFIG"]).write_text("attach: custom\n")
        register()
        assert set(overrides()) == {"CUSTOM", "CPU_ATTN", "CPU_MLA", "AMX_MLA"}

    def test_enabled_false(self, log: list[logging.LogRecord]) -> None:
        """No member is overridden; one line says so."""
        path = Path(os.environ["GLASSBOX_CONFIG"])
        path.write_text("enabled: false\n")
        register()
        assert set(overrides()) == {"CUSTOM"}
        assert [record.getMessage() for record in log] == [f"`enabled: false` in {path}: nothing is observed"]

    def test_overridden_by_another_plugin(self, log: list[logging.LogRecord]) -> None:
        """A backend that somebody else put in vLLM's place is left there, before and after."""
        registry.register_backend(Backend.TRITON_ATTN, "somewhere.else.Backend")
        try:
            register()
            assert overrides()["TRITON_ATTN"] == "somewhere.else.Backend"
            assert overrides()["FLASH_ATTN"] == "glassbox.adapter.attention.observed.ObservedFLASH_ATTN"
            (record,) = log
            assert record.levelno == logging.WARNING
            assert "TRITON_ATTN is overridden by somewhere.else.Backend already" in record.getMessage()
            unregister()
            assert overrides() == {"TRITON_ATTN": "somewhere.else.Backend"}
        finally:
            Backend.TRITON_ATTN.clear_override()


class TestRefusal:
    @pytest.mark.parametrize(
        "broken", [one for one in BROKEN if not one.lacks_permission], ids=lambda broken: broken.name
    )
    def test_bad_file(self, broken: Broken) -> None:
        """The process ends with one line; nothing was attached, and no run directory made."""
        path = Path(os.environ["GLASSBOX_CONFIG"])
        broken.apply(path)
        with pytest.raises(SystemExit) as end:
            register()
        assert f"glassbox: {broken.message(path)}" == end.value.code
        assert not attached()
        assert [] == [found for found in path.parent.iterdir() if found != path]

    def test_a_path_that_cannot_be_used(self) -> None:
        """Valid is not enough: the exporter would die of it, again and again."""
        path = Path(os.environ["GLASSBOX_CONFIG"])
        path.write_text("export: {jsonl: {path: ~run.jsonl}}\n")
        with pytest.raises(
            SystemExit, match=r"export.jsonl.path must be a file that can be written to, got '~run.jsonl'"
        ):
            register()
        assert not attached()

    def test_a_variable_without_a_home(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """GLASSBOX_CONFIG of a user that isn't there ends the process in one line, too."""
        monkeypatch.setenv("GLASSBOX_CONFIG", "~nobody-here/glassbox.yaml")
        with pytest.raises(
            SystemExit, match=r"glassbox: ~nobody-here/glassbox.yaml: GLASSBOX_CONFIG must lead to a file"
        ):
            register()
        assert not attached()

    def test_wrong_inner_backend(self) -> None:
        """The error lists the right ones."""
        Path(os.environ["GLASSBOX_CONFIG"]).write_text("inner_backend: FLASH\n")
        with pytest.raises(SystemExit, match="inner_backend must be auto or one of CPU_ATTN, FLASH_ATTN, TRITON_ATTN"):
            register()

    @pytest.mark.parametrize(
        ("found", "message"),
        [
            (
                "0.25.1",
                "vLLM 0.25.1 is not supported, this glassbox observes vLLM 0.26 to 0.33; the server runs unobserved. "
                "Install vLLM 0.33",
            ),
            (
                None,
                "vLLM is not installed; install vllm-glassbox[cuda], or for CPUs run tools/install_cpu.sh of a clone",
            ),
        ],
    )
    def test_unsupported_vllm(
        self, found: str | None, message: str, log: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One error line, no exception, nothing attached: the server runs unobserved."""
        monkeypatch.setattr(release, "vllm_version", lambda: found)
        register()
        assert [(record.levelname, record.getMessage()) for record in log] == [("ERROR", message)]
        assert not attached()

    def test_compat_tested(self, log: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch) -> None:
        """Whoever wants tested releases alone gets a line on a newer one."""
        Path(os.environ["GLASSBOX_CONFIG"]).write_text("compat: tested\n")
        monkeypatch.setattr(release, "vllm_version", lambda: "0.99.0")
        register()
        (record,) = log
        assert record.getMessage().startswith("vLLM 0.99.0 is not among the tested ones (0.26 to 0.33) and compat is")
        assert not attached()

    def test_a_vllm_without_what_attaching_needs(
        self, log: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is named; nothing was changed."""
        gone = ("vllm.v1.attention.backends.registry.register_backend",)
        monkeypatch.setattr(internals, "lacks", lambda feature: gone)
        register()
        (record,) = log
        assert (
            "lacks what glassbox needs for attaching to vLLM: vllm.v1.attention.backends.registry.register_backend"
            in (record.getMessage())
        )
        assert not attached()


class TestFailure:
    """vLLM dies of an exception from a plugin; glassbox is no reason to die."""

    def assert_unobserved(self, log: list[logging.LogRecord]) -> None:
        (record,) = log
        assert record.levelno == logging.ERROR
        assert record.getMessage() == "glassbox could not attach; the server runs unobserved"
        assert record.exc_info is not None
        assert not attached()
        assert rundir.RUN_DIR_ENV not in os.environ

    def test_while_attaching(self, log: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch) -> None:
        """What was attached before the error is taken back."""

        def fail(_config: object) -> None:
            assert overrides()["CPU_ATTN"]
            raise RuntimeError("no")

        monkeypatch.setattr(shown_metrics, "install", fail)
        register()
        self.assert_unobserved(log)

    def test_while_overriding(self, log: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch) -> None:
        """A member that can't be overridden leaves none of the others overridden, nor CUSTOM."""
        path = overrides_module.observed_path

        def fail_at_triton(name: str) -> str:
            if name == "TRITON_ATTN":
                raise KeyError(name)
            return path(name)

        monkeypatch.setattr(overrides_module, "observed_path", fail_at_triton)
        register()
        self.assert_unobserved(log)

    def test_a_package_that_is_missing(self) -> None:
        """One of those that glassbox needs can't be imported: vLLM goes on, and the log says why."""
        program = (
            "import sys; sys.modules['watchfiles'] = None\n"
            "from glassbox.plugin import register; register(); print('went on')"
        )
        out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert out.stdout.strip() == "went on"
        assert "glassbox could not attach; the server runs unobserved" in out.stderr
        assert "watchfiles" in out.stderr

    def test_registry_of_another_shape(self, log: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch) -> None:
        """A vLLM that only claims to be 0.32."""
        monkeypatch.delattr(registry, "MambaAttentionBackendEnum")
        register()
        self.assert_unobserved(log)

    def test_module_that_does_not_load(self, log: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch) -> None:
        """A broken dependency of glassbox's own."""
        monkeypatch.setitem(sys.modules, "glassbox.config.settings", None)
        register()
        self.assert_unobserved(log)


class TestUnregister:
    def test_nothing_registered(self) -> None:
        """It does nothing."""
        unregister()
        assert not attached()

    def test_takes_everything_back(self) -> None:
        """Overrides, registry API, collector and variable."""
        from prometheus_client import REGISTRY

        def state() -> object:
            return dict(vars(registry)), overrides(), set(REGISTRY._collector_to_names), dict(os.environ)

        before = state()
        register()
        assert before != state()
        unregister()
        assert before == state()
        assert SEAT.registration is None

    def test_the_run_directory_outlives_workers(self, tmp_path: Path) -> None:
        """A process whose executor ends its workers when it ends itself, as on a node without API server, removes the
        directory after that: what a worker writes last would make it anew."""
        program = (
            "import weakref; from glassbox.plugin import register; from glassbox.store import rundir\n"
            "class Executor: pass\n"
            "first = Executor(); weakref.finalize(first, int)\n"
            "register(); path = rundir.create(); executor = Executor()\n"
            "weakref.finalize(executor, lambda: print(path.is_dir()))"
        )
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[3])}
        out = subprocess.run(
            [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert out.stdout.split() == ["True"]
        assert list(tmp_path.glob("glassbox-*")) == []

    def test_run_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its own is removed; one that the operator named stays, and so does the variable."""
        register()
        own = rundir.create()
        assert own.is_dir()
        unregister()
        assert not own.exists()

        monkeypatch.setenv(rundir.RUN_DIR_ENV, str(tmp_path / "named"))
        register()
        rundir.create()
        unregister()
        assert (tmp_path / "named").is_dir()
        assert os.environ[rundir.RUN_DIR_ENV] == str(tmp_path / "named")

    def test_another_servers_run_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """This process and its children have one of their own instead; afterwards the variables are as they were."""
        named = {rundir.RUN_DIR_ENV: str(tmp_path / "named")}
        other = OtherProcess(named)
        monkeypatch.setenv(rundir.RUN_DIR_ENV, str(tmp_path / "named"))
        try:
            register()
            own = rundir.create()
            assert own not in {other.run_dir, Path(named[rundir.RUN_DIR_ENV])}
            assert os.environ[rundir.RUN_DIR_ENV] == str(own)
            unregister()
        finally:
            other.kill()
        assert not own.exists()
        assert os.environ[rundir.RUN_DIR_ENV] == str(tmp_path / "named")
        assert OWNER_ENV not in os.environ
