"""GLASSBOX_* is among what vLLM itself copies to Ray's workers."""

import importlib
import os
from collections.abc import Iterator

import pytest

from glassbox.adapter import ray_environment

ray_env = pytest.importorskip(ray_environment.MODULE, reason="needs vLLM")
VARIABLES = {"GLASSBOX_CONFIG": "/etc/glassbox.yaml", "GLASSBOX_RUN_DIR": "/tmp/run", "GLASSBOX_DISABLE": "1"}


@pytest.fixture(autouse=True)
def _as_vllm_has_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Variables that are set, none of whoever runs the tests, and a list that nobody has added to."""
    for name in [name for name in os.environ if name.startswith(ray_environment.PREFIX)]:
        monkeypatch.delenv(name)
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    listed = ray_env.DEFAULT_ENV_VAR_PREFIXES
    had = ray_environment.PREFIX in listed
    listed.discard(ray_environment.PREFIX)
    yield
    if had:
        listed.add(ray_environment.PREFIX)


def copied() -> set[str]:
    return {name for name in ray_env.get_env_vars_to_copy(destination="workers") if name.startswith("GLASSBOX_")}


class TestCarry:
    def test_vllm_copies_them(self) -> None:
        """Configuration, run directory and kill switch; without glassbox none, and none after the undo."""
        assert copied() == set()
        undo = ray_environment.carry()
        assert copied() == set(VARIABLES)
        undo()
        assert copied() == set()

    def test_what_was_listed_stays(self) -> None:
        """The undo of the second who asks takes nothing from the first."""
        ray_environment.carry()
        ray_environment.carry()()
        assert copied() == set(VARIABLES)

    def test_the_compile_cache_is_not_lost(self) -> None:
        """The key of vLLM's compile cache is the same with glassbox as without."""
        from vllm import envs

        before = envs.compile_factors()
        ray_environment.carry()
        assert envs.compile_factors() == before

    def test_a_vllm_without_the_list(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One that copies everything, say: nothing is changed."""
        monkeypatch.delattr(ray_env, "DEFAULT_ENV_VAR_PREFIXES")
        ray_environment.carry()()

    def test_who_starts_actors_has_it_before_plugins(self) -> None:
        """The engine's process, and whoever starts engines, load the module with their own."""
        core, utils = (importlib.import_module(f"vllm.v1.engine.{name}") for name in ("core", "utils"))
        assert utils.get_env_vars_to_copy is ray_env.get_env_vars_to_copy
        assert core.EngineZmqAddresses is utils.EngineZmqAddresses
