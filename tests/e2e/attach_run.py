"""Program of the tests: serves two prompts in process and prints who saw the attention, as JSON.

    python tests/e2e/attach_run.py MODEL '{"attention_backend": "CUSTOM"}'

The second argument holds further arguments of `vllm.LLM`. Steps are counted at vLLM's scheduler, which glassbox does
not touch.
"""

import json
import os
import sys
from typing import Any, Final

PROMPTS: Final = ([101, 102, 103, 104, 105], list(range(200, 260)))
MAX_TOKENS: Final = (12, 5)


def main(model: str, arguments: dict[str, Any]) -> None:
    """Serve, and print what was found."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        **{"enforce_eager": True, "max_model_len": 256, "max_num_seqs": 4, "seed": 0, **arguments},
    )
    core = llm.llm_engine.engine_core.engine_core
    schedule, real_steps = core.scheduler.schedule, []

    def counting_schedule(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        if output.total_num_scheduled_tokens:
            real_steps.append(output.total_num_scheduled_tokens)
        return output

    core.scheduler.schedule = counting_schedule
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS],
        [SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True) for tokens in MAX_TOKENS],
        use_tqdm=False,
    )
    worker = core.model_executor.driver_worker.worker
    result = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "steps": len(real_steps),
        # Nobody has scraped this process or asked its routes.
        "shown": [m for m in sys.modules if m.startswith(("glassbox.export", "glassbox.web", "glassbox.view"))],
        "compiled": llm.llm_engine.vllm_config.compilation_config.mode != 0,
        **who_sees(worker),
        **measured(),
    }
    sys.stdout.write(f"RESULT {json.dumps(result)}\n")
    sys.stdout.flush()


def who_sees(worker: Any) -> dict[str, Any]:
    """Classes of the layers' backends, impls and builders, and of who is patched."""
    from vllm.v1.attention.backends import registry

    runner = worker.model_runner
    layers = worker.vllm_config.compilation_config.static_forward_context
    builders = [type(group.get_metadata_builder()).__qualname__ for groups in runner.attn_groups for group in groups]
    return {
        "backends": sorted({f"{cls.__module__}.{cls.__qualname__}" for cls in map(backend_of, layers.values())}),
        "impls": sorted({type(layer.impl).__qualname__ for layer in layers.values()}),
        "builders": sorted(set(builders)),
        "num_layers": len(layers),
        "patched": sorted(
            name
            for name, method in (
                ("execute_model", type(runner).execute_model),
                ("compile_or_warm_up_model", type(worker).compile_or_warm_up_model),
            )
            if method.__globals__["__name__"].startswith("glassbox.")
        ),
        "overridden": sorted(member.name for member in registry._ATTN_OVERRIDES),
    }


def backend_of(layer: Any) -> Any:
    """The backend class of an attention layer."""
    return layer.attn_backend


def measured() -> dict[str, Any]:
    """The numbers of this process's observer; no `observer` without one."""
    seat = sys.modules.get("glassbox.adapter.seat")
    observer = seat.SEAT.listener if seat else None
    if observer is None:
        return {"observer": False}
    counters = observer.counters
    rows = observer.measurer.copy(0.0).rows  # [L, H, 2]
    return {
        "observer": True,
        "counted_steps": counters.steps,
        "sampled_steps": counters.sampled_steps,
        "rows": [[int(value) for value in rows[..., phase].flatten()] for phase in (0, 1)],
    }


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    main(sys.argv[1], json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
