"""The command `glassbox heads`. Owns which prompts it takes, output and exit status.

The rule by which heads are found, and the file that is written, are `signals/focus_heads.py`'s; the format of prompts
is `view/samples/samples_file.py`'s, and asking a model `glassbox.Extractor`'s.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from glassbox.cli.commands.common import check_output, one_line_errors, require
from glassbox.cli.commands.own_engine import EngineArgOption, engine_arguments, engine_errors, load_extractor

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from glassbox import Extractor
    from glassbox.signals.focus_heads import FocusHeads
    from glassbox.store.trace_record import RequestTrace
    from glassbox.view.samples.samples_file import Sample

    Measured = tuple[npt.NDArray[np.float64], tuple[int, ...], tuple[int, ...]]

SPAN: Final = "instruction"
MAX_PROMPTS: Final = 1000
_REMEDY: Final = "docs/signals.md has the format"


def heads(
    data: Annotated[Path, typer.Option("--data", help="Prompts, a line of JSON each; docs/signals.md has the format.")],
    model: Annotated[str, typer.Option("--model", help="Name or folder of the model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file of heads.")] = Path("heads.json"),
    deviations: Annotated[
        float,
        typer.Option(
            "--deviations",
            "-k",
            min=0,
            max=100,
            help="Standard deviations by more than which a head's focus must fall under attack.",
        ),
    ] = 4.0,
    engine_arg: EngineArgOption = None,
) -> None:
    """Find the heads whose attention to an instruction tells an attack from a normal prompt.

    Name the file in the server's YAML, `requests: {focus_heads: FILE}`: the
    signal `focus` is then taken over these heads.
    Exit status: 0, or 1 if the prompts or the model can't be used, or no head tells.

    \b
    Examples:
      glassbox heads --model MODEL --data prompts.jsonl -o heads.json
      glassbox heads --model MODEL --data prompts.jsonl -k 3 --engine-arg max_model_len=2048
    """
    check_output(output, ".json")
    arguments = engine_arguments(engine_arg or ())
    with one_line_errors():
        from glassbox.signals.focus_heads import write_focus_heads

        prompts = read_prompts(data)
        require("tables", "finding heads", "pyarrow")
        require("cpu` or `cuda", "finding heads", "vllm")
        found = _found(model, arguments, prompts, deviations)
        write_focus_heads(output, found)
    for one in found.heads[:10]:
        typer.echo(f"layer {one.layer:3} head {one.head:3}: {one.deviations:.1f} deviations")
    typer.echo(f"{len(found.heads)} heads are in {output}; name it in the server's YAML as requests.focus_heads")


def read_prompts(path: Path) -> tuple["Sample", ...]:
    """Read and check the whole file.

    Raises:
        ViewError: it can't be read, or a line breaks a rule; the message says which.
    """
    from glassbox.view.measured import ViewError
    from glassbox.view.samples.samples_file import read_samples

    prompts = read_samples(path).samples
    if len(prompts) > MAX_PROMPTS:
        raise ViewError(f"{path} must have at most {MAX_PROMPTS} prompts; a few of each kind will do")
    for prompt in prompts:
        broken = _broken_rule(prompt)
        if broken:
            raise ViewError(f"{path}, prompt {prompt.id}: {broken}; {_REMEDY}")
    for kind, attacked in (("normal", False), ("attacked", True)):
        count = sum(prompt.label is attacked for prompt in prompts)
        if count < 2:
            raise ViewError(
                f"{path} must have two {kind} prompts or more (label {json.dumps(attacked)}), got {count}; "
                "they have a standard deviation then, ten of each will do"
            )
    return prompts


def _broken_rule(prompt: "Sample") -> str:
    """What is asked of a prompt beyond a sample; empty if it is so."""
    if prompt.answer is not None:
        return "a prompt must have no answer, since its last token is looked at"
    if prompt.label is None:
        return "label must be true for an attack, or false"
    if [place.name for place in prompt.spans] != [SPAN]:
        return f"spans must have one name, {SPAN}"
    return ""


def _found(model: str, arguments: Mapping[str, Any], prompts: Sequence["Sample"], deviations: float) -> "FocusHeads":
    import numpy as np

    from glassbox.core.printable import printable
    from glassbox.signals.focus_heads import FocusHeads, falls, important
    from glassbox.view.measured import ViewError

    extractor = load_extractor(model, arguments, prompts, max_tokens=1)
    with engine_errors(model):
        focus, layers, numbers = focus_of(extractor, prompts)
    attacked = np.array([prompt.label for prompt in prompts], dtype=bool)
    fall = falls(focus[~attacked], focus[attacked])
    heads = important(fall, layers, numbers, deviations)
    if not heads:
        if np.isnan(fall).all():
            raise ViewError(
                "no head has a focus on the instruction of every prompt: some prompts' last rows were not measured, or "
                "no layer is observed; glassbox check names what isn't"
            )
        raise ViewError(
            f"no head's focus falls by more than {deviations:g} standard deviations, the most is "
            f"{float(np.nanmax(fall)):.2f}; use a smaller --deviations, or prompts that are more alike"
        )
    name = printable(Path(model).name if Path(model).is_dir() else model)[:256]
    return FocusHeads(name, deviations, int((~attacked).sum()), int(attacked.sum()), heads)


def focus_of(extractor: "Extractor", prompts: Sequence["Sample"]) -> "Measured":
    """Focus of each head on each prompt's instruction, [prompts, L, H], and the layers and heads.

    Args:
        extractor: of one token: each prompt's last row is all that is looked at.
        prompts: to ask.

    Raises:
        ViewError: an instruction isn't found in its prompt, or a prompt can't be asked.
    """
    import numpy as np

    from glassbox.signals import focus

    found = extractor.traces(prompts)
    traces = [_checked(prompt, trace) for prompt, trace in zip(prompts, found, strict=True)]
    nothing = np.full(traces[0].stats.shape[1:3], np.nan)
    rows = [focus.compute(trace).by_place.get("mass", nothing) for trace in traces]
    return np.array(rows, dtype=np.float64), traces[0].layers, traces[0].heads


def _checked(prompt: "Sample", found: "RequestTrace | ValueError") -> "RequestTrace":
    from glassbox.view.measured import ViewError

    if isinstance(found, ValueError):
        raise ViewError(f"prompt {prompt.id}: {found}")
    end = int(found.span_ranges[0, 1])
    if end > found.prompt_len:
        raise ViewError(
            f"prompt {prompt.id}: spans {SPAN} must end within the prompt's {found.prompt_len} tokens, got {end}"
        )
    return found
