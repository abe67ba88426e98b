"""What is observed under which setting, and that everything else of vLLM stays as it is."""

import json
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final

import pytest

from glassbox.adapter.server import INTAKE_PATCHES
from glassbox.core.cpu import serving_dtype
from tests.e2e import attach_run, speculative_run
from tests.program import Finished, environment, run_program

pytestmark = pytest.mark.e2e

NUM_LAYERS, NUM_HEADS = 30, 9
PREFILL_ROWS: Final = 8
# vLLM and transformers both compute in float32, with their own order of summation.
ENTROPY_NATS, MASS, LOGPROB = 1e-3, 1e-4, 2e-3
INNER: Final = "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"
OBSERVED: Final = "glassbox.adapter.attention.observed.ObservedCPU_ATTN"
# Rows of one layer and head: some positions of each prompt, and every generated token but the last.
EXPECTED_ROWS: Final = (
    sum(min(PREFILL_ROWS, len(prompt)) for prompt in attach_run.PROMPTS),
    sum(tokens - 1 for tokens in attach_run.MAX_TOKENS),
)


def serve(model: Path, folder: Path, config: str, **arguments: Any) -> Finished:
    """Two prompts through a vLLM of its own."""
    path = folder / "glassbox.yaml"
    path.write_text(f"sample_rate: 1.0\nsampling: {{prefill_rows_per_request: {PREFILL_ROWS}}}\n{config}\n")
    env = environment(path, folder / "run")
    return run_program(
        "e2e/attach_run.py", [str(model), json.dumps({"dtype": serving_dtype(), **arguments})], env, folder
    )


def assert_observed(result: Mapping[str, Any]) -> None:
    assert result["backends"] == [OBSERVED]
    assert result["impls"] == ["ObservedCPU_ATTNImpl"]
    assert result["builders"] == ["ObservedCPU_ATTNBuilder"]
    assert result["num_layers"] == NUM_LAYERS
    assert result["patched"] == ["compile_or_warm_up_model", "execute_model"]
    # Profile runs and warm-up come before the first step and are not among them.
    assert result["shown"] == [], "what exports and shows is for whoever is asked"
    assert result["steps"] == result["counted_steps"] == result["sampled_steps"] > 0
    assert [[count] * (NUM_LAYERS * NUM_HEADS) for count in EXPECTED_ROWS] == result["rows"]


def assert_vllms_own(result: Mapping[str, Any]) -> None:
    assert result["backends"] == [INNER]
    assert result["impls"] == ["CPUAttentionBackendImpl"]
    assert result["builders"] == ["CPUAttentionMetadataBuilder"]


def assert_untouched(result: Mapping[str, Any]) -> None:
    assert_vllms_own(result)
    assert result["patched"] == []
    assert result["observer"] is False


class TestAttach:
    def test_auto_needs_no_flag(self, demo_model_path: Path, tmp_path: Path) -> None:
        """Every layer is observed and exactly the real steps are counted, torch.compile and its warm-up included."""
        finished = serve(demo_model_path, tmp_path, "attach: auto", enforce_eager=False)
        assert finished.result["compiled"]
        assert_observed(finished.result)
        assert f"Observing {NUM_LAYERS} of {NUM_LAYERS} attention layers (CPU_ATTN)" in finished.log

    def test_custom_without_the_flag(self, demo_model_path: Path, tmp_path: Path) -> None:
        """vLLM's own classes run, no step is measured, and it is said once, with what helps."""
        finished = serve(demo_model_path, tmp_path, "attach: custom")
        assert_vllms_own(finished.result)
        assert finished.result["steps"] == finished.result["counted_steps"] > 0
        assert (finished.result["sampled_steps"], finished.result["rows"]) == (0, [[], []])
        assert f"None of the {NUM_LAYERS} attention layers" in finished.log
        assert 1 == finished.log.count("use attach: auto, or start vLLM with --attention-backend CUSTOM")

    def test_custom_with_the_flag(self, demo_model_path: Path, tmp_path: Path) -> None:
        """`--attention-backend CUSTOM` observes on the CPU as well, whose platform ignores that flag.

        It has one backend, so that another `inner_backend` is said not to be used.
        """
        config = "attach: custom\ninner_backend: FLASH_ATTN"
        finished = serve(demo_model_path, tmp_path, config, attention_backend="CUSTOM")
        assert_observed(finished.result)
        assert finished.log.count("inner_backend FLASH_ATTN is not used") == 1

    def test_enabled_false(self, demo_model_path: Path, tmp_path: Path) -> None:
        """No member of vLLM is overridden; CUSTOM alone is named, so that the flag does no harm."""
        finished = serve(demo_model_path, tmp_path, "enabled: false", attention_backend="CUSTOM")
        assert_untouched(finished.result)
        assert finished.result["overridden"] == ["CUSTOM"]
        assert "nothing is observed" in finished.log
        assert not (tmp_path / "run").exists()


class TestSpeculativeDecoding:
    @pytest.mark.parametrize("method", ["ngram", "draft_model"])
    def test_rows_are_the_models(self, demo_model_path: Path, tmp_path: Path, method: str) -> None:
        """A step's newest token is a decode row, its drafts are not; a trace has those that were kept, and no other."""
        path = tmp_path / "glassbox.yaml"
        path.write_text(
            "sample_rate: 1.0\n"
            "sampling: {max_rows_per_step: 4096, prefill_rows_per_request: 8}\n"
            "export: {interval_s: 0.2}\n"
            "statistics: "
            f"{{sink_tokens: {speculative_run.SINK_TOKENS}, local_window: {speculative_run.LOCAL_WINDOW}}}\n"
        )
        env = environment(path, tmp_path / "run")
        result = run_program("e2e/speculative_run.py", [str(demo_model_path), method], env, tmp_path).result

        prompt_len, num_tokens = result["prompt_len"], result["num_tokens"]
        assert num_tokens == prompt_len + speculative_run.NUM_TOKENS
        assert result["steps"] < speculative_run.NUM_TOKENS, "drafts must have been accepted"
        assert result["shape"][:2] == [NUM_LAYERS, NUM_HEADS], "the drafter's layers are not among them"
        assert result["rows_per_layer_and_head"] == [result["num_rows"]]
        positions = [position for position, _ in result["phase_of_position"]]
        assert all(phase == (position >= prompt_len) for position, phase in result["phase_of_position"])
        decode = [position for position in positions if position >= prompt_len]
        assert positions == sorted(set(positions)), "no row is counted twice"
        assert len(decode) == result["steps"] - 1, "one row per step after the prompt's"
        assert decode[-1] < num_tokens - 1
        assert result["dropped"].keys() == {"draft"}
        drafts = result["dropped"]["draft"] // (NUM_LAYERS * NUM_HEADS)
        assert speculative_run.NUM_TOKENS - 1 - len(decode) <= drafts <= speculative_run.DRAFT_TOKENS * len(decode)
        assert result["tokens_again"]
        answer = [position for position in result["trace_positions"] if position >= prompt_len]
        assert answer == list(range(prompt_len, num_tokens - 1)), "every generated token, once"
        assert [] == result["trace_notes"]
        assert result["sum_errors"].pop("logprobs") < LOGPROB
        assert result["sum_errors"].pop("received") < num_tokens * MASS
        for errors in (result["errors"], result["trace_errors"]):
            assert errors.pop("entropy_ratio") < ENTROPY_NATS
        for errors in (result["errors"], result["trace_errors"], result["sum_errors"]):
            assert all(error < MASS for error in errors.values()), errors


def states(folder: Path, *actions: str, **env: str) -> list[dict[str, Any]]:
    """States of a vLLM process: after its imports, and after each action."""
    folder.mkdir(exist_ok=True)
    found: list[dict[str, Any]] = run_state(folder, *actions, **env).result["states"]
    return found


def run_state(folder: Path, *actions: str, **env: str) -> Finished:
    return run_program("e2e/plugin_state.py", actions, environment(**env), folder)


class TestUntouched:
    """The state of a process: vLLM's modules and classes, collectors, threads, files, environment, exit functions."""

    def test_disabled_is_as_if_not_installed(self, tmp_path: Path) -> None:
        """With GLASSBOX_DISABLE=1 nothing differs from a process that does not load the plugin at all."""
        plugins = {entry.name for entry in entry_points(group="vllm.general_plugins")}
        assert "glassbox" in plugins
        absent = run_state(tmp_path, "load", VLLM_PLUGINS=",".join(sorted(plugins - {"glassbox"})))
        disabled = run_state(tmp_path, "load", VLLM_PLUGINS=",".join(sorted(plugins)), GLASSBOX_DISABLE="1")
        assert absent.result["loaded"] == []
        # The switch itself, and what hands it on to workers that inherit nothing.
        modules = ["glassbox", "glassbox.adapter", "glassbox.adapter.ray_environment"]
        modules += ["glassbox.core", "glassbox.core.kill_switch", "glassbox.plugin"]
        assert disabled.result["loaded"] == modules, "it was found, and did nothing"
        for expected, found in zip(absent.result["states"], disabled.result["states"], strict=True):
            assert expected.keys() == found.keys()
            for key, value in expected.items():
                assert value == found[key], key

    def test_register_starts_and_writes_nothing(self, tmp_path: Path) -> None:
        """No thread, no child, no open file and no file at all, in whatever process."""
        before, after = states(tmp_path, "register")
        for key in ("threads", "children", "open_files", "files", "signals", "vllm_loggers"):
            assert before[key] == after[key], key
        # Two finders, which wait for the API server's modules and its /metrics; the paths are as they were.
        finders, *paths = before["import_hooks"]
        assert [finders + 2, *paths] == after["import_hooks"]
        run_dir = Path(after["environment"]["GLASSBOX_RUN_DIR"])
        assert not run_dir.exists()
        changed = {name for name, content in after["classes"].items() if before["classes"][name] != content}
        enums = {name for name in changed if name.endswith("AttentionBackendEnum")}
        assert enums, "the registry's enums get methods"
        passed_by_requests = {patch.cls for patch in INTAKE_PATCHES}
        patched = {name.rpartition(".")[2] for name in changed - enums}
        # Of the workers the one method that comes before real steps.
        assert {"AsyncLLM", "Worker", "CPUWorker"} <= patched <= {*passed_by_requests, "Worker", "CPUWorker"}
        assert len(after["collectors"]) == len(before["collectors"]) + 1

    def test_register_twice_and_unregister(self, tmp_path: Path) -> None:
        """The second registration changes nothing; unregister takes all of the first back, exactly, and again."""
        found = states(tmp_path, "register", "register", "unregister", "register", "unregister")
        for state in found:
            del state["exit_functions"]  # Python counts those that were taken back, too
            # Unpredictable each time.
            run_dir = state["environment"].pop("GLASSBOX_RUN_DIR", None)
            state["environment"]["names a run directory"] = str(run_dir is not None)
        first, once, twice, without, again, last = found
        assert once == twice
        assert once != first
        assert first == without
        assert once == again
        assert first == last
