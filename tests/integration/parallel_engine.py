"""One vLLM with as many ranks as asked for, in a process of its own: serves given tokens, saves what they measured.

    python -m tests.integration.parallel_engine SPEC.json

The spec is the `ParallelSpec` below as JSON. What is generated is given as well, so that engines whose arithmetic
differs in the last digit measure the same rows.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from glassbox.core.output_checks import LayerState
from glassbox.core.statistics import PHASES, STATISTICS
from tests.integration.gpu_engine import measured_positions
from tests.program import RESULT, environment, run_program

LAYERS, HEADS, KV_HEADS, VOCABULARY = 4, 8, 4, 512
# The only token that is ever generated.
FORCED: Final = 7
_ARRAYS: Final = ("counts", "sums", "rows", "nonfinite")
_SETTLED_S: Final = 60.0
# Signals on demand come after all that computes, such as another engine that starts beside this one.
_SCORED_S: Final = 240.0


@dataclass(frozen=True)
class ParallelSpec:
    """What to run.

    Attributes:
        model: folder. prompts: token ids. max_tokens: of each prompt.
        out: path without suffix.
        llm_args: arguments of vllm.LLM.
        options: of glassbox, of each request; its traces are saved as well.
        probe: file of one that scores these traces; empty is none.
    """

    model: str
    prompts: list[list[int]]
    max_tokens: int
    out: str
    llm_args: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] | None = None
    probe: str = ""

    @property
    def rows(self) -> tuple[int, int]:
        """Measured rows of each layer and head, prefill and decode."""
        positions = [measured_positions(len(prompt), len(prompt) + self.max_tokens) for prompt in self.prompts]
        return sum(len(prefill) for prefill, _ in positions), sum(len(decode) for _, decode in positions)


@dataclass(frozen=True)
class ParallelResult:
    """What an engine left behind: the ranks' snapshots joined.

    Attributes:
        report: `tokens`; of each worker `rank`, `layers`, `heads`, and in `hosts` its host;
            `states` of the layers, `errors`, `canary_rows`;
            `scores` of each traced request, as the exporter left them.
    """

    spec: ParallelSpec
    report: dict[str, Any]

    @property
    def name(self) -> str:
        """For messages."""
        return Path(self.spec.out).name

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """counts, sums, rows and nonfinite, [L, H, ...] of the whole model."""
        with np.load(f"{self.spec.out}.npz") as saved:
            return dict(saved)

    def trace(self, number: int) -> dict[str, np.ndarray]:
        """The arrays of a request's trace, its ranks merged."""
        with np.load(f"{self.spec.out}-trace{number}.npz") as saved:
            return dict(saved)


def run(spec: ParallelSpec) -> None:
    """Serve, wait for the snapshots that have it all, and save them."""
    from vllm import LLM, SamplingParams

    from glassbox.store.merge import merge
    from glassbox.store.snapshot import read_snapshots

    llm = LLM(spec.model, skip_tokenizer_init=True, enable_prefix_caching=False, seed=0, **spec.llm_args)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in spec.prompts],
        SamplingParams(
            temperature=0,
            max_tokens=spec.max_tokens,
            ignore_eos=True,
            detokenize=False,
            allowed_token_ids=[FORCED],
            extra_args=spec.options,
        ),
        use_tqdm=False,
    )
    expected, run_dir = sum(spec.rows), Path(os.environ["GLASSBOX_RUN_DIR"])
    deadline = time.monotonic() + _SETTLED_S
    while True:
        (engine,) = merge(read_snapshots(run_dir))
        # On a GPU what a check found may come a snapshot after the rows.
        known = not (engine.checks.state == LayerState.PENDING).any()
        if (known and int(engine.rows.sum(-1).min()) >= expected) or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    scores: list[dict[str, Any]] = []
    if spec.options is not None:
        heads = {head for one in engine.workers for head in range(one.heads.start, one.heads.stop)}
        scores = _save_traces(llm, [output.request_id for output in outputs], spec, run_dir, heads)
    np.savez(f"{spec.out}.npz", **{name: getattr(engine, name) for name in _ARRAYS})  # type: ignore[arg-type]
    workers = [
        {"rank": one.rank, "layers": list(one.layers), "heads": [one.heads.start, one.heads.stop]}
        for one in engine.workers
    ]
    report = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "workers": workers,
        "hosts": [one.host for one in engine.workers],
        "states": engine.checks.state.tolist(),
        "errors": engine.numbers["errors"],
        "canary_rows": engine.numbers["canary_rows"],
        "backend": engine.build["backend"],
        "scores": scores,
    }
    print(RESULT + json.dumps(report))


def _save_traces(
    llm: Any, request_ids: list[str], spec: ParallelSpec, run_dir: Path, heads: set[int]
) -> list[dict[str, Any]]:
    """Save them, and return the scores that the server's exporter has made of them, if there is a probe.

    Args:
        heads: of all ranks.
    """
    from glassbox.adapter.offline_engine import deliver_ends
    from glassbox.store.score_files import ScoreFiles
    from glassbox.store.trace_directory import TraceDirectory

    deliver_ends(llm)
    directory, files, scores = TraceDirectory(run_dir), ScoreFiles(run_dir), []
    deadline = time.monotonic() + (_SCORED_S if spec.probe else _SETTLED_S)
    for number, request_id in enumerate(request_ids):
        while (trace := directory.get(request_id)) is None or trace.status == "active":
            assert time.monotonic() < deadline, f"{request_id} left no trace"
            time.sleep(0.1)
        assert heads == {*trace.heads}, f"{request_id} had ended before all ranks had written it"
        path = f"{spec.out}-trace{number}.npz"
        np.savez(path, notes=np.array(trace.notes, dtype=str), **trace.arrays)  # type: ignore[arg-type]
        while spec.probe:
            files.refresh()
            found = files.of((trace.engine, trace.internal_id, trace.client))
            if found is not None:
                scores.append(dict(found.summary))
                break
            assert time.monotonic() < deadline, f"{request_id} has no scores"
            time.sleep(0.1)
    return scores


def run_engine(
    spec: ParallelSpec,
    folder: Path,
    *,
    timeout_s: float = 600.0,
    program: str = "integration/parallel_engine.py",
    prefix: Sequence[str] = (),
    **env: str,
) -> ParallelResult:
    """Run one in a process of its own, all of whose steps are measured.

    Args:
        program: that calls `run`; prefix: see `run_program`.
    """
    folder.mkdir()
    config = folder / "glassbox.yaml"
    probes = f"probes: [{{file: {spec.probe}}}]\n" if spec.probe else ""
    config.write_text(f"sample_rate: 1.0\nexport: {{interval_s: 0.5}}\nrequests: {{max_trace_mb: 64}}\n{probes}")
    path = folder / "spec.json"
    path.write_text(json.dumps(asdict(spec)))
    environ = environment(config, folder / "run", **env)
    finished = run_program(program, [str(path)], environ, folder, timeout_s, prefix)
    return ParallelResult(spec, finished.result)


def prompts() -> list[list[int]]:
    """Of several lengths, one shorter than the rows that are measured of a prompt; no two begin alike."""
    rng = np.random.default_rng(3)
    found: list[list[int]] = [rng.integers(8, VOCABULARY, size=n).tolist() for n in (5, 40, 97)]
    return found


def random_llama(folder: Path, *, layers: int = LAYERS, head_size: int = 32) -> Path:
    """A model whose heads share out among two ranks, and whose attention isn't uniform, with random float32 weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * head_size,
        intermediate_size=2 * HEADS * head_size,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            torch.nn.init.normal_(projection.weight, std=2 / config.hidden_size**0.5)  # scores of some units
    model.save_pretrained(folder)
    return folder


def assert_same_rows(one: ParallelResult, other: ParallelResult, close: float) -> None:
    """Two engines served and measured the same: as many rows of each layer and head, with the same values.

    Args:
        close: how far apart the mean of a statistic may be, relative where it is above 1; the buckets of as large a
            share of the rows may differ, since a value that lies on a bound falls to either side.
    """
    assert_all_rows(one)
    assert_all_rows(other)
    assert one.report["tokens"] == other.report["tokens"], f"{one.name} and {other.name} served other tokens"
    names = f"{one.name} and {other.name}"
    assert np.array_equal(one.arrays["nonfinite"], other.arrays["nonfinite"]), f"{names} differ in non-finite rows"
    counts, others = one.arrays["counts"], other.arrays["counts"]
    assert np.array_equal(counts.sum(-1), others.sum(-1)), f"{names} differ in the number of values"
    moved, limit = int(np.abs(counts - others).sum()) // 2, close * counts.sum()
    assert moved <= limit, f"{moved} values of {names} lie in different buckets, more than {limit:.1f}"
    rows = one.arrays["rows"].astype(np.float64)[..., None]
    means, their = one.arrays["sums"] / rows, other.arrays["sums"] / rows
    apart = np.abs(means - their) / (1 + np.abs(means))
    worst = np.unravel_index(np.argmax(apart), apart.shape)
    layer, head, phase, statistic = map(int, worst)
    assert apart[worst] <= close, (
        f"mean {STATISTICS[statistic].name} of layer {layer}, head {head}, {PHASES[phase]}: {one.name} "
        f"{means[worst]:.6g}, {other.name} {their[worst]:.6g}, {apart[worst]:.2g} apart, not {close:g}; "
        f"{np.count_nonzero(apart > close)} of {apart.size} means are so"
    )


def assert_all_rows(result: ParallelResult) -> None:
    """Every row that was to be measured was, once in each layer and head."""
    rows = result.arrays["rows"]
    wrong = np.argwhere((rows != result.spec.rows).any(-1))
    assert not len(wrong), (
        f"{result.name}: {len(wrong)} of {rows.shape[0] * rows.shape[1]} places lack rows, the first at layer and head "
        f"{wrong[0].tolist()}: {rows[tuple(wrong[0])].tolist()} prefill and decode rows, not {list(result.spec.rows)}"
    )


def assert_certified(result: ParallelResult) -> None:
    """Every layer was reproduced on every rank that has it, and nothing went wrong."""
    report = result.report
    wrong = [layer for layer, state in enumerate(report["states"]) if state != LayerState.CERTIFIED]
    found = f"{result.name}: canary {report['canary_rows']}, errors {report['errors']}, states {report['states']}"
    assert len(report["states"]) == len(result.arrays["rows"]), found
    assert wrong == [], f"layers {wrong} are not certified; {found}"
    assert report["errors"] == {}, found
    assert report["canary_rows"]["failed"] == 0, found


if __name__ == "__main__":
    run(ParallelSpec(**json.loads(Path(sys.argv[1]).read_text())))
