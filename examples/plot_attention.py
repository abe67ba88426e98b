"""Plot the attention of one answer: which tokens each generated token looked at.

    tools/install_cpu.sh python '.[cpu,tables]'      # from a clone; with a GPU: pip install '.[cuda,tables]'
    python examples/plot_attention.py MODEL "The capital of France is" --out attention.png

Left: attention of every generated token to every token before it, averaged over the chosen layers and heads. Right: how
spread out the attention is (entropy) and how much of it goes to the prompt (look-back), token by token.
"""

import argparse
import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from glassbox import Capture

# Trace soon after the answer, and let an answer of a few hundred tokens keep its full rows.
CONFIG = """\
sample_rate: 0
export: {interval_s: 0.5, prometheus: {enabled: false}}
requests: {max_trace_mb: 1024, max_active_mb: 1024, keep_mb: 1024, include_text: true}
"""


def main() -> None:
    """Read the command line, run the model, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", help="a model's name or folder")
    parser.add_argument("prompt")
    parser.add_argument("--out", type=Path, default=Path("attention.png"))
    parser.add_argument("--tokens", type=int, default=24, help="length of the answer")
    parser.add_argument("--layers", type=int, nargs="*", help="global indices; default: all")
    parser.add_argument("--heads", type=int, nargs="*", help="global indices; default: all")
    parser.add_argument("--keep-sink", action="store_true", help="show the first token, too, which takes the most")
    arguments = parser.parse_args()

    # Removed at the very end: the engine's processes watch the file as long as they live.
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = folder / "glassbox.yaml"
    config.write_text(CONFIG)
    # Before vLLM loads its plugins, glassbox among them.
    os.environ.setdefault("GLASSBOX_CONFIG", str(config))
    captured, words = run(arguments)
    draw(captured, words, arguments.out, keep_sink=arguments.keep_sink)
    print(f"{arguments.out}: {captured.requests['text'][0].as_py()!r}")  # noqa: T201


def run(arguments: argparse.Namespace) -> tuple["Capture", list[str]]:
    """The answer with its attention, and the text of each token."""
    from vllm import LLM, SamplingParams

    import glassbox

    llm = LLM(arguments.model, max_model_len=2048, enforce_eager=True)
    params = SamplingParams(temperature=0, max_tokens=arguments.tokens)
    captured = glassbox.capture(
        llm, [arguments.prompt], params, layers=arguments.layers, heads=arguments.heads, rows=True
    )
    tokenizer = llm.get_tokenizer()
    output = captured.outputs[0]
    ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    return captured, [tokenizer.decode([token]).replace("\n", "\\n") for token in ids]


def mean_rows(captured: "Capture") -> tuple[list[int], np.ndarray]:
    """Positions of the generated rows [T], and their attention averaged over layers and heads [T, keys]."""
    sums: dict[int, list[Any]] = {}
    for line in captured.attention.select(["position", "phase", "attention"]).to_pylist():
        if line["phase"] == "decode":
            sums.setdefault(line["position"], []).append(line["attention"])
    positions = sorted(sums)
    keys = max(positions) + 1
    rows = np.full((len(positions), keys), np.nan)
    for i, position in enumerate(positions):
        rows[i, : position + 1] = np.mean(sums[position], axis=0)
    return positions, rows


def draw(captured: "Capture", words: list[str], path: Path, *, keep_sink: bool) -> None:
    """Draw the picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    positions, rows = mean_rows(captured)
    first = 0 if keep_sink else 1
    prompt_len = captured.requests["prompt_len"][0].as_py()
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(4 + 0.22 * len(words), 2 + 0.24 * len(positions)), width_ratios=[4, 1], layout="constrained"
    )
    image = left.imshow(rows[:, first:], cmap="magma_r", aspect="auto", interpolation="nearest")
    left.set_xticks(range(rows.shape[1] - first), words[first : rows.shape[1]], rotation=90, fontsize=8)
    left.set_yticks(range(len(positions)), [words[p] for p in positions], fontsize=8)
    left.axvline(prompt_len - first - 0.5, color="tab:blue", linewidth=1)
    left.set_xlabel("token attended to" + ("" if keep_sink else " (the first one, a sink, left out)"))
    left.set_ylabel("generated token")
    figure.colorbar(image, ax=left, label="attention, mean over layers and heads", pad=0.01)
    decode = captured.rows.filter(np.array([phase == "decode" for phase in captured.rows["phase"].to_pylist()]))
    at = np.array(decode["position"].to_pylist())
    for name, color in (("entropy_ratio", "tab:orange"), ("lookback_ratio", "tab:blue")):
        values = np.array([np.nan if v is None else v for v in decode[name].to_pylist()])
        means = [np.nanmean(values[at == position]) for position in positions]
        right.plot(means, range(len(positions)), color=color, label=name)
    right.set(xlim=(0, 1), ylim=(len(positions) - 0.5, -0.5), yticks=[])
    right.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
