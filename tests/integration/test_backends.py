"""Observed subclasses of vLLM's backends, and the CUSTOM router in front of them."""

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest

from glassbox.adapter.attention import observed, router
from glassbox.adapter.attention.observed import inner_class, observed_class, observed_path
from glassbox.adapter.attention.router import GlassboxBackend
from glassbox.adapter.seat import SEAT
from glassbox.config.load import MLA_BACKENDS, SUPPORTED_INNER_BACKENDS
from tests.program import environment, run_program

registry = pytest.importorskip("vllm.v1.attention.backends.registry", reason="needs vLLM")
pytestmark = pytest.mark.integration

# Some of what vLLM asks these classes for, to notice if a release renames it.
BACKEND_FLAGS: Final = {"forward_includes_kv_cache_update", "supported_dtypes", "supported_kv_cache_dtypes"}
IMPL_FLAGS: Final = {"can_return_lse_for_decode", "supports_dcp", "supports_pcp", "is_sparse"}
BUILDER_FLAGS: Final = {
    "_cudagraph_support",
    "reorder_batch_threshold",
    "requires_block_table_width",
    "supports_update_block_table",
    "supports_draft_decode_metadata_update",
}
# What importing a backend raises where its kernels are missing; CUTLASS_MLA's module allocates on the GPU.
UNAVAILABLE: Final = (ImportError, AssertionError)
# What an observed class defines itself; everything else is inherited.
NAMES_OF_CLASSES: Final = {"__module__", "__qualname__", "__doc__", "__parameters__", "__orig_bases__", "_abc_impl"}
NAMES_OF_CLASSES |= {"__abstractmethods__", "__dict__", "__weakref__", "__static_attributes__", "__firstlineno__"}


def available(name: str) -> Any:
    """The observed class, or skip with vLLM's own reason why the inner backend can't be imported here."""
    try:
        return observed_class(name)
    except UNAVAILABLE as error:
        pytest.skip(f"vLLM can't import {name} here: {error}")


def own_names(cls: type) -> set[str]:
    return set(vars(cls)) - NAMES_OF_CLASSES


@pytest.mark.parametrize("name", SUPPORTED_INNER_BACKENDS)
class TestObservedClass:
    def test_true_subclasses(self, name: str) -> None:
        """Backend, impl and builder derive from vLLM's own: isinstance and issubclass checks hold."""
        cls, inner = available(name), inner_class(name)
        assert cls.__bases__ == (inner,)
        assert cls.get_impl_cls().__bases__ == (inner.get_impl_cls(),)
        assert cls.get_builder_cls().__bases__ == (inner.get_builder_cls(),)

    def test_keeps_the_inner_name(self, name: str) -> None:
        """`get_name()` is a member of vLLM's enum, the inner's."""
        cls = available(name)
        assert cls.get_name() == name
        assert registry.AttentionBackendEnum[cls.get_name()] is registry.AttentionBackendEnum[name]

    def test_found_by_its_path(self, name: str) -> None:
        """Importing `full_cls_name` gives the very class, however often."""
        cls = available(name)
        module, qualname = cls.full_cls_name()
        assert observed_path(name) == f"{module}.{qualname}"
        assert getattr(importlib.import_module(module), qualname) is cls
        assert getattr(importlib.import_module(module), qualname) is cls
        assert cls.get_impl_cls() is cls.get_impl_cls()
        assert cls.get_builder_cls() is cls.get_builder_cls()

    def test_adds_nothing_else(self, name: str) -> None:
        """The backend gives other classes; the impl looks at forward, the builder at build and who its layers are.

        What is derived from the builder may be one of chunks, of which the outer one is looked at.
        """
        cls = available(name)
        assert own_names(cls) == {"get_impl_cls", "get_builder_cls"}
        assert own_names(cls.get_impl_cls()) == {"__init__"}
        assert own_names(cls.get_builder_cls()) == (
            {"__init__", "build"} if name in MLA_BACKENDS else {"__init_subclass__", "build"}
        )

    def test_forward_is_vllms_unless_it_is_listened_to(self, name: str) -> None:
        """A step that is not measured runs vLLM's own method."""
        impl, inner = available(name).get_impl_cls(), inner_class(name).get_impl_cls()
        methods = {"forward_mha", "forward_mqa"} if name in MLA_BACKENDS else {"forward"}
        assert [getattr(inner, method) for method in methods] == [getattr(impl, method) for method in methods]
        SEAT.listening.listen(True)
        try:
            assert own_names(impl) == {"__init__", *methods}
        finally:
            SEAT.listening.listen(False)
        assert [getattr(inner, method) for method in methods] == [getattr(impl, method) for method in methods]

    def test_inherited_flags(self, name: str) -> None:
        """Each flag and each method that vLLM asks the classes for is the inner's."""
        cls, inner = available(name), inner_class(name)
        for ours, theirs, flags in (
            (cls, inner, BACKEND_FLAGS),
            (cls.get_impl_cls(), inner.get_impl_cls(), IMPL_FLAGS),
            (cls.get_builder_cls(), inner.get_builder_cls(), BUILDER_FLAGS),
        ):
            assert flags <= set(dir(theirs)), "vLLM has renamed a flag"
            inherited = set(dir(theirs)) - own_names(ours) - set(dir(type))
            for attribute in inherited - NAMES_OF_CLASSES:
                value, expected = getattr(ours, attribute), getattr(theirs, attribute)
                assert getattr(value, "__func__", value) == getattr(expected, "__func__", expected), attribute

    def test_kv_cache_update_comes_first(self, name: str) -> None:
        """K of the step is in the cache when forward begins: on that the measuring relies."""
        if name in MLA_BACKENDS:
            from vllm.model_executor.layers.attention.mla_attention import MLAAttention

            body = inspect.getsource(MLAAttention.forward)
            assert 0 < body.index("update_kv_cache(") < body.index("self.forward_impl(")
        else:
            assert available(name).forward_includes_kv_cache_update is False

    def test_concrete(self, name: str) -> None:
        """Nothing abstract is left that the inner classes had made concrete."""
        cls, inner = available(name), inner_class(name)
        assert cls.get_impl_cls().__abstractmethods__ == inner.get_impl_cls().__abstractmethods__
        assert cls.get_builder_cls().__abstractmethods__ == inner.get_builder_cls().__abstractmethods__


class TestObservedModule:
    def test_names_are_distinct(self) -> None:
        """Two inners share no class name: vLLM groups layers by it."""
        classes = []
        for name in SUPPORTED_INNER_BACKENDS:
            try:
                cls = observed_class(name)
            except UNAVAILABLE:
                continue
            classes += [cls, cls.get_impl_cls(), cls.get_builder_cls()]
        assert len(classes) >= 6, "at least CPU_ATTN and one for GPUs can be made anywhere"
        assert len({(cls.__module__, cls.__qualname__) for cls in classes}) == len(classes)
        assert len(set(classes)) == len(classes)

    @pytest.mark.parametrize("name", ["ObservedFLEX_ATTENTION", "Observed", "FLASH_ATTN", "nonsense"])
    def test_unknown_class(self, name: str) -> None:
        """Only the supported backends have an observed class."""
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
            getattr(observed, name)

    def test_missing_kernels(self) -> None:
        """Where vLLM can't import a backend, the error is its own: vLLM then takes the next one."""
        try:
            inner_class("FLASHINFER")
        except ImportError as error:
            with pytest.raises(type(error), match=str(error)):
                getattr(observed, "ObservedFLASHINFER")  # noqa: B009 (made on demand)
        else:
            pytest.skip("FlashInfer is installed here")

    def test_backends_of_gpus(self) -> None:
        """All that is tested above holds for those that load here only with their kernels' packages stubbed."""
        names = ("FLASHINFER", "FLASHINFER_MLA", "FLASH_ATTN_MLA", "CUTLASS_MLA")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.integration.gpu_kernels_stub"]
        command += [f"{__file__}::TestObservedClass", "-k", " or ".join(names), "-p", "no:cacheprovider"]
        finished = subprocess.run(
            command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600, check=False
        )
        tests = sum(name.startswith("test_") for name in vars(TestObservedClass))
        assert f"{len(names) * tests} passed" in finished.stdout, finished.stdout + finished.stderr


LAYER: Final = {"head_size": 64, "kv_cache_dtype": "auto", "block_size": None}


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the server was started with."""
    started = SimpleNamespace(enabled=True, attach="auto", inner_backend="auto")
    monkeypatch.setattr(SEAT, "settings", SimpleNamespace(started_with=started))
    monkeypatch.setattr(SEAT, "inner_name", None)
    return started


class TestRouter:
    @staticmethod
    def platform_picks(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        from vllm.platforms import current_platform

        # Not the platform itself: a module of vLLM's that is imported meanwhile would keep the replacement.
        path = registry.AttentionBackendEnum[name].value
        monkeypatch.setattr(current_platform, "get_attn_backend_cls", lambda backend, **_: path)

    def test_auto(self, settings: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
        """`inner_backend: auto` is whatever the platform picks for the layer."""
        for name in ("TRITON_ATTN", "CPU_ATTN"):
            self.platform_picks(monkeypatch, name)
            assert GlassboxBackend.validate_configuration(dtype=None, **LAYER) == []
            assert GlassboxBackend.full_cls_name() == ("glassbox.adapter.attention.observed", f"Observed{name}")

    def test_not_observable(self, settings: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another backend is refused with a reason that says what to do."""
        self.platform_picks(monkeypatch, "FLEX_ATTENTION")
        assert GlassboxBackend.validate_configuration(dtype=None, **LAYER) == [
            "glassbox can't observe FLEX_ATTENTION, which vLLM picks for this layer; it observes CPU_ATTN, FLASH_ATTN, "
            "TRITON_ATTN, FLASHINFER, CPU_MLA, AMX_MLA, TRITON_MLA, FLASH_ATTN_MLA, FLASHMLA, CUTLASS_MLA, "
            "FLASHINFER_MLA. Leave out --attention-backend CUSTOM, or name one of these as inner_backend"
        ]

    def test_named_and_unfit(self, settings: SimpleNamespace) -> None:
        """A named backend's own reasons are handed on."""
        import torch

        settings.inner_backend = "TRITON_ATTN"
        from vllm.platforms.interface import DeviceCapability

        wrong = {**LAYER, "dtype": torch.float64, "use_mla": True}
        wrong |= {"has_sink": False, "use_sparse": False, "use_mm_prefix": False, "use_per_head_quant_scales": False}
        wrong |= {"attn_type": "decoder"}
        capability = DeviceCapability(9, 0)
        fields = selector_fields(wrong)
        expected = inner_class("TRITON_ATTN").validate_configuration(device_capability=capability, **fields)
        assert expected != []
        assert GlassboxBackend.validate_configuration(device_capability=capability, **fields) == expected

    def test_order(self, settings: SimpleNamespace) -> None:
        """Without validation before there is no class to name."""
        with pytest.raises(RuntimeError, match="resolved before its configuration was validated"):
            GlassboxBackend.full_cls_name()

    def test_enabled_false(self, settings: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
        """CUSTOM then stands for vLLM's own class."""
        settings.enabled = False
        self.platform_picks(monkeypatch, "TRITON_ATTN")
        assert GlassboxBackend.validate_configuration(dtype=None, **LAYER) == []
        inner = inner_class("TRITON_ATTN")
        assert GlassboxBackend.full_cls_name() == (inner.__module__, inner.__qualname__)

    def test_is_what_settings_register(self) -> None:
        """The path under which CUSTOM is registered is this class's."""
        from glassbox.adapter.publish import CUSTOM_BACKEND_PATH

        assert f"{router.__name__}.{GlassboxBackend.__qualname__}" == CUSTOM_BACKEND_PATH


def selector_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """All fields of vLLM's AttentionSelectorConfig."""
    from vllm.v1.attention.selector import AttentionSelectorConfig

    return dict(AttentionSelectorConfig(**fields)._asdict())


class TestCudaSelection:
    """vLLM's own selection code for a GPU of compute capability 9.0."""

    OBSERVED: Final = "glassbox.adapter.attention.observed.Observed"

    @staticmethod
    def select(folder: Path, config: str, *cases: tuple[str | None, dict[str, Any]]) -> list[dict[str, Any]]:
        path = folder / "glassbox.yaml"
        path.write_text(config)
        program = "integration/cuda_selection.py"
        finished = run_program(program, [json.dumps(cases)], environment(path, folder / "run"), folder)
        found: list[dict[str, Any]] = finished.result
        return found

    def test_auto(self, tmp_path: Path) -> None:
        """With or without CUSTOM each layer gets the observed class of what vLLM picks; sparse MLA is out of reach."""
        mla = {"use_mla": True, "head_size": 576}
        sparse = {**mla, "use_sparse": True, "kv_cache_dtype": "fp8_ds_mla"}
        results = self.select(
            tmp_path,
            "attach: auto\n",
            *((backend, {"dtype": dtype}) for backend in (None, "CUSTOM") for dtype in ("bfloat16", "float32")),
            ("FLASH_ATTN", {"dtype": "bfloat16"}),
            ("FLASH_ATTN", {"dtype": "float32"}),
            (None, mla),
            ("CUSTOM", mla),
            ("CUSTOM", {"block_size": 8}),
            ("TRITON_MLA", mla),
            (None, sparse),
            ("CUSTOM", sparse),
        )
        flash = {"class": f"{self.OBSERVED}FLASH_ATTN", "name": "FLASH_ATTN"}
        triton = {"class": f"{self.OBSERVED}TRITON_ATTN", "name": "TRITON_ATTN"}
        assert results[:5] == [flash, triton, flash, triton, flash]
        assert "dtype not supported" in results[5]["error"], "vLLM's own checks stay"
        latent = {"class": f"{self.OBSERVED}FLASH_ATTN_MLA", "name": "FLASH_ATTN_MLA"}
        assert results[6:8] == [latent, latent]
        assert "No valid attention backend found" in results[8]["error"]
        assert results[9] == {"class": f"{self.OBSERVED}TRITON_MLA", "name": "TRITON_MLA"}
        assert results[10]["name"] == "FLASHMLA_SPARSE"
        assert results[10]["class"].startswith("vllm."), "what glassbox can't observe is left to vLLM"
        assert "glassbox can't observe FLASHMLA_SPARSE" in results[11]["error"]

    def test_custom(self, tmp_path: Path) -> None:
        """`attach: custom`: only CUSTOM is observed, and `inner_backend` is what it stands for, or vLLM's reason."""
        results = self.select(
            tmp_path,
            "attach: custom\ninner_backend: FLASH_ATTN\n",
            (None, {}),
            ("CUSTOM", {}),
            ("CUSTOM", {"dtype": "float32"}),
        )
        assert results[0]["class"] == "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"
        assert results[1]["class"] == f"{self.OBSERVED}FLASH_ATTN"
        assert "CUSTOM is not valid for this configuration. Reason: ['dtype not supported']" in results[2]["error"]

    def test_enabled_false(self, tmp_path: Path) -> None:
        """Nothing is observed, with the flag neither."""
        results = self.select(tmp_path, "enabled: false\n", (None, {}), ("CUSTOM", {}))
        inner = "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"
        assert [result["class"] for result in results] == [inner, inner]
