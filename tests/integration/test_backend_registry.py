"""The registry config API on vLLM's own registry module."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from glassbox.adapter.backend_registry import Handle, install

registry = pytest.importorskip("vllm.v1.attention.backends.registry", reason="needs vLLM")
pytestmark = pytest.mark.integration

Attention = registry.AttentionBackendEnum
Mamba = registry.MambaAttentionBackendEnum


def state() -> dict[str, Any]:
    """Everything of vLLM's registry that installing could touch, by identity."""
    return {
        "module": dict(vars(registry)),
        **{enum.__name__: dict(vars(enum)) for enum in (Attention, Mamba)},
        "overrides": (dict(registry._ATTN_OVERRIDES), dict(registry._MAMBA_ATTN_OVERRIDES)),
    }


@pytest.fixture
def handle() -> Iterator[Handle]:
    handle = install()
    yield handle
    handle.remove()
    for member in (*Attention, *Mamba):
        member.clear_override()


@pytest.fixture(params=[(Attention.CUSTOM, False), (Mamba.LINEAR, True)], ids=["attention", "mamba"])
def member(request: pytest.FixtureRequest) -> tuple[Any, bool]:
    return request.param


class TestInstall:
    def test_removed_exactly(self) -> None:
        """After remove, module and enums hold the identical objects as before, also after use."""
        before = state()
        handle = install()
        registry.register_backend(Attention.CUSTOM, "a.B", backend_config=1)
        assert handle.installed
        handle.remove()
        Attention.CUSTOM.clear_override()
        assert state() == before
        assert not handle.installed
        handle.remove()
        assert state() == before

    def test_idempotent(self, handle: Handle) -> None:
        """Installing twice changes nothing the second time, and keeps configurations."""
        registry.register_backend(Attention.CUSTOM, "a.B", backend_config=1)
        before = state()
        assert install() is handle
        assert state() == before
        assert registry.get_backend_config(Attention.CUSTOM) == 1

    def test_again_after_remove(self, handle: Handle) -> None:
        """A new installation starts without configurations."""
        registry.register_backend(Attention.CUSTOM, "a.B", backend_config=1)
        handle.remove()
        second = install()
        try:
            assert Attention.CUSTOM.get_config() is None
        finally:
            second.remove()

    def test_someone_elses_patch(self) -> None:
        """A patch that someone put over ours survives our removal."""
        original = registry.register_backend
        handle = install()
        ours = registry.register_backend

        def theirs(*args: Any, **kwargs: Any) -> Any:
            return ours(*args, **kwargs)

        registry.register_backend = theirs
        handle.remove()
        try:
            assert registry.register_backend is theirs
            assert not hasattr(registry, "get_backend_config")
        finally:
            registry.register_backend = original

    def test_vllm_that_has_it(self) -> None:
        """A vLLM whose register_backend takes backend_config is used untouched."""
        own = ModuleType("registry")

        def register_backend(
            backend: Any, class_path: Any = None, is_mamba: bool = False, backend_config: Any = None
        ) -> None: ...

        own.register_backend = register_backend
        before = dict(vars(own))
        handle = install(own)
        assert not handle.installed
        handle.remove()
        assert vars(own) == before


class TestConfig:
    def test_none_by_default(self, handle: Handle, member: tuple[Any, bool]) -> None:
        """A backend without configuration has None, registered or not."""
        backend, is_mamba = member
        assert backend.get_config() is None
        registry.register_backend(backend, "a.B", is_mamba)
        assert backend.get_config() is None
        assert registry.get_backend_config(backend) is None

    def test_direct(self, handle: Handle, member: tuple[Any, bool]) -> None:
        """The direct form stores the object given, and registers the path."""
        backend, is_mamba = member
        config = {"sample_rate": 0.1}
        registry.register_backend(backend, "some.module.Backend", is_mamba, config)
        assert backend.get_config() is config
        assert registry.get_backend_config(backend) is config
        assert backend.get_path() == "some.module.Backend"

    def test_decorator(self, handle: Handle, member: tuple[Any, bool]) -> None:
        """The decorator form stores it when it registers the class, and returns the class."""
        backend, is_mamba = member
        decorator = registry.register_backend(backend, is_mamba=is_mamba, backend_config=[1])

        class Backend: ...

        assert decorator(Backend) is Backend
        assert backend.get_config() == [1]
        assert backend.get_path() == f"{__name__}.{Backend.__qualname__}"

    def test_falsy(self, handle: Handle) -> None:
        """Any object but None is a configuration: 0 and {} too."""
        for config in (0, {}, False, ""):
            registry.register_backend(Attention.CUSTOM, "a.B", backend_config=config)
            assert Attention.CUSTOM.get_config() is config

    def test_kept(self, handle: Handle, member: tuple[Any, bool]) -> None:
        """A later registration without configuration keeps it, one with another replaces it."""
        backend, is_mamba = member
        registry.register_backend(backend, "a.B", is_mamba, backend_config=1)
        registry.register_backend(backend, "a.C", is_mamba)
        assert (backend.get_config(), backend.get_path()) == (1, "a.C")
        registry.register_backend(backend, "a.C", is_mamba, backend_config=2)
        assert backend.get_config() == 2

    def test_clear(self, handle: Handle, member: tuple[Any, bool]) -> None:
        """clear_config forgets the configuration, not the registration; twice is as good as once."""
        backend, is_mamba = member
        registry.register_backend(backend, "a.B", is_mamba, backend_config=1)
        backend.clear_config()
        backend.clear_config()
        assert backend.get_config() is None
        assert backend.is_overridden()

    def test_override_cleared(self, handle: Handle) -> None:
        """clear_override, which is vLLM's, leaves the configuration."""
        registry.register_backend(Attention.CUSTOM, "a.B", backend_config=1)
        Attention.CUSTOM.clear_override()
        assert Attention.CUSTOM.get_config() == 1

    def test_apart(self, handle: Handle) -> None:
        """Each member has its own, CUSTOM of attention another than CUSTOM of mamba."""
        registry.register_backend(Attention.CUSTOM, "a.B", backend_config=1)
        registry.register_backend(Mamba.CUSTOM, "a.M", is_mamba=True, backend_config=2)
        assert (Attention.CUSTOM.get_config(), Mamba.CUSTOM.get_config()) == (1, 2)
        assert Attention.FLASH_ATTN.get_config() is None


class TestNames:
    @pytest.fixture
    def names(self) -> Iterator[None]:
        """Takes the members away that a test makes by name."""
        before = {enum: list(enum._member_names_) for enum in (Attention, Mamba)}
        yield
        for enum, names in before.items():
            for name in [name for name in enum._member_names_ if name not in names]:
                member = enum._member_map_.pop(name)
                enum._member_names_.remove(name)
                enum._value2member_map_.pop(member.value, None)
                type.__delattr__(enum, name)
                (registry._ATTN_OVERRIDES if enum is Attention else registry._MAMBA_ATTN_OVERRIDES).pop(member, None)

    @pytest.mark.parametrize(("enum", "is_mamba"), [(Attention, False), (Mamba, True)])
    def test_name(self, handle: Handle, names: None, enum: Any, is_mamba: bool) -> None:
        """A name makes a new member, as in vLLM, with its configuration."""
        registry.register_backend("GLASSBOX_TEST", "a.B", is_mamba, backend_config=3)
        assert enum["GLASSBOX_TEST"].get_config() == 3
        assert enum["GLASSBOX_TEST"].get_path() == "a.B"

    def test_name_in_decorator(self, handle: Handle, names: None) -> None:
        """So it does in the decorator form."""

        @registry.register_backend("GLASSBOX_TEST", backend_config=3)
        class Backend: ...

        assert Attention["GLASSBOX_TEST"].get_config() == 3

    def test_taken_name(self, handle: Handle) -> None:
        """A registration that vLLM refuses stores nothing."""
        with pytest.raises(ValueError, match="already exists"):
            registry.register_backend("CUSTOM", "a.B", backend_config=3)
        assert Attention.CUSTOM.get_config() is None
