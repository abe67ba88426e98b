"""The command `glassbox heads`. Owns its prompts' file, the engine's environment, output and exit status.

The rule by which heads are found, and the file that is written, are `signals/focus_heads.py`'s.
"""

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from glassbox.cli.commands.common import check_output, fail, one_line_errors, require

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from glassbox.adapter.offline_engine import OfflineEngine
    from glassbox.signals.focus_heads import FocusHeads

    Measured = tuple[npt.NDArray[np.float64], tuple[int, ...], tuple[int, ...]]

SPAN: Final = "instruction"
MAX_PROMPTS: Final = 1000
_MAX_BYTES: Final = 64 << 20
_FIELDS: Final = {"prompt", "messages", "spans", "label", "id"}
_REMEDY: Final = "docs/signals.md has the format"
# Each prompt's last row is all that is looked at.
_CONFIG: Final = """\
sample_rate: 0
sampling: {prefill_rows_per_request: 1, max_rows_per_step: 4096}
requests: {max_active: 256, max_trace_mb: 256, max_active_mb: 4096, keep: 1024, keep_mb: 4096}
export: {interval_s: 0.2, prometheus: {enabled: false}}
"""


@dataclass(frozen=True)
class FocusPrompt:
    """One line of the file.

    Attributes:
        line: its number.
        prompt: text, or the messages of a chat.
        instruction: a text that stands in the prompt once, (start, end) in tokens, or the index of a message.
        attacked: whether it is an attack.
    """

    line: int
    prompt: str | Sequence[Mapping[str, Any]]
    instruction: str | tuple[int, int] | int
    attacked: bool


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
    engine_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Of vllm.LLM, such as max_model_len=4096 or dtype=float16; may be repeated.",
            show_default=False,
        ),
    ] = None,
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
    arguments = _engine_arguments(engine_arg or ())
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


def read_prompts(path: Path) -> list[FocusPrompt]:
    """Read and check the whole file.

    Raises:
        ViewError: it can't be read, or a line breaks a rule; the message says which.
    """
    from glassbox.core.json_fields import FieldError, parse_json
    from glassbox.view.input_file import open_file
    from glassbox.view.measured import ViewError

    prompts: list[FocusPrompt] = []
    with open_file(path, _MAX_BYTES, "name a file of prompts, a line of JSON each") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                prompts.append(_prompt(number, parse_json(line)))
            except FieldError as error:
                raise ViewError(f"{path}, line {number}: {error}; {_REMEDY}") from None
            if len(prompts) > MAX_PROMPTS:
                raise ViewError(f"{path} must have at most {MAX_PROMPTS} prompts; a few of each kind will do")
    for kind, attacked in (("normal", False), ("attacked", True)):
        count = sum(prompt.attacked is attacked for prompt in prompts)
        if count < 2:
            raise ViewError(
                f"{path} must have two {kind} prompts or more (label {json.dumps(attacked)}), got {count}; "
                "they have a standard deviation then, ten of each will do"
            )
    return prompts


def _prompt(number: int, value: Any) -> FocusPrompt:
    from glassbox.core.json_fields import FieldError

    if not isinstance(value, dict) or not value.keys() <= _FIELDS:
        raise FieldError(f"the line must be a mapping of {', '.join(sorted(_FIELDS))}")
    text, messages, spans = value.get("prompt"), value.get("messages"), value.get("spans")
    if (text is None) == (messages is None):
        raise FieldError("a prompt must have either prompt or messages")
    if messages is None and not (isinstance(text, str) and text):
        raise FieldError("prompt must be a text")
    if text is None and not (
        isinstance(messages, list) and messages and all(isinstance(one, dict) for one in messages)
    ):
        raise FieldError("messages must be a list of mappings, as the OpenAI API takes them")
    if value.get("label") not in (True, False):
        raise FieldError("label must be true for an attack, or false")
    if not isinstance(spans, dict) or list(spans) != [SPAN]:
        raise FieldError(f"spans must have one name, {SPAN}")
    prompt: Any = text if messages is None else messages
    return FocusPrompt(number, prompt, _place(spans[SPAN]), bool(value["label"]))


def _place(value: Any) -> str | tuple[int, int] | int:
    from glassbox.core.json_fields import FieldError

    if isinstance(value, str) and value:
        return value
    if (
        isinstance(value, list)
        and len(value) == 2
        and all(type(one) is int for one in value)
        and 0 <= value[0] < value[1]
    ):
        return value[0], value[1]
    if isinstance(value, dict) and list(value) == ["message"] and type(value["message"]) is int:
        return int(value["message"])
    raise FieldError(f'spans {SPAN} must be a text of the prompt, [start, end] in tokens, or {{"message": index}}')


def located(prompt: FocusPrompt, tokenizer: Any) -> tuple[list[int], tuple[int, int]]:
    """Tokens of a prompt, and where its instruction stands among them.

    Raises:
        ViewError: that can't be told; the message says which line and why.
    """
    from glassbox.view.measured import ViewError

    where = f"line {prompt.line}"
    chat = not isinstance(prompt.prompt, str)
    text = _rendered(prompt.prompt, tokenizer, where)
    place = prompt.instruction
    if isinstance(place, tuple):
        tokens = tokenizer.encode(text, add_special_tokens=not chat)
        if place[1] > len(tokens):
            raise ViewError(f"{where}: spans {SPAN} must end within the prompt's {len(tokens)} tokens, got {place[1]}")
        return tokens, place
    wanted = place if isinstance(place, str) else _of_message(prompt, place, where)
    if text.count(wanted) != 1:
        raise ViewError(
            f"{where}: the instruction must stand in the prompt once, it does {text.count(wanted)} times; give more of "
            "its text, or [start, end] in tokens"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ViewError("an instruction by text or message needs a fast tokenizer; give [start, end] in tokens")
    encoded = tokenizer(text, add_special_tokens=not chat, return_offsets_mapping=True)
    begin = text.index(wanted)
    inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < begin + len(wanted) and b > begin]
    return encoded["input_ids"], (inside[0], inside[-1] + 1)


def _rendered(prompt: str | Sequence[Mapping[str, Any]], tokenizer: Any, where: str) -> str:
    from glassbox.view.measured import ViewError

    if isinstance(prompt, str):
        return prompt
    try:
        text: str = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may raise whatever it likes
        raise ViewError(f"{where}: the chat template refuses its messages: {str(error)[:200]}") from None
    return text


def _of_message(prompt: FocusPrompt, index: int, where: str) -> str:
    from glassbox.view.measured import ViewError

    messages = [] if isinstance(prompt.prompt, str) else prompt.prompt
    if not -len(messages) <= index < len(messages):
        raise ViewError(f"{where}: spans {SPAN} must name one of {len(messages)} messages, got {index}")
    content = messages[index].get("content")
    if not isinstance(content, str) or not content.strip():
        raise ViewError(f"{where}: message {index} must have a text; name another, or give [start, end] in tokens")
    return content.strip()


def _found(model: str, arguments: Mapping[str, Any], prompts: Sequence[FocusPrompt], deviations: float) -> "FocusHeads":
    import numpy as np

    from glassbox.core.printable import printable
    from glassbox.signals.focus_heads import FocusHeads, falls, important
    from glassbox.view.measured import ViewError

    focus, layers, numbers = _measured(model, arguments, prompts)
    attacked = np.array([prompt.attacked for prompt in prompts])
    fall = falls(focus[~attacked], focus[attacked])
    heads = important(fall, layers, numbers, deviations)
    if not heads:
        most = float(np.nanmax(fall)) if np.isfinite(fall).any() else float("nan")
        raise ViewError(
            f"no head's focus falls by more than {deviations:g} standard deviations, the most is {most:.2f}; "
            "use a smaller --deviations, or prompts that are more alike"
        )
    name = printable(Path(model).name if Path(model).is_dir() else model)[:256]
    return FocusHeads(name, deviations, int((~attacked).sum()), int(attacked.sum()), heads)


def _measured(model: str, arguments: Mapping[str, Any], prompts: Sequence[FocusPrompt]) -> "Measured":
    """`focus_of` with an engine in this process: however this ends, no other one stays behind."""
    from glassbox.view.measured import ViewError

    # Removed at the very end: the engine follows the file as long as it lives.
    folder = Path(tempfile.mkdtemp(prefix="glassbox-heads-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = folder / "glassbox.yaml"
    config.write_text(_CONFIG, encoding="utf-8")
    # Before vLLM is imported, which reads its variables then.
    os.environ |= {"GLASSBOX_CONFIG": str(config), "GLASSBOX_RUN_DIR": str(folder / "run")}
    os.environ.pop("GLASSBOX_DISABLE", None)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from glassbox.adapter.offline_engine import load_engine

    try:
        return focus_of(load_engine(model, {"enforce_eager": True, **arguments}), prompts)
    except ViewError:
        raise
    except Exception as error:  # of vLLM, torch or transformers
        what = f"{type(error).__name__}: {error}"[:600]
        raise ViewError(
            f"vLLM can't run {model} ({what}); VLLM_LOGGING_LEVEL=INFO says more, --engine-arg helps with memory"
        ) from None


def focus_of(engine: "OfflineEngine", prompts: Sequence[FocusPrompt]) -> "Measured":
    """Focus of each head on each prompt's instruction, [prompts, L, H], and the layers and heads.

    Args:
        engine: a vllm.LLM, made after glassbox was installed.
        prompts: to ask.

    Raises:
        ViewError: an instruction isn't found in its prompt.
    """
    import numpy as np

    from glassbox import capture
    from glassbox.adapter.offline_engine import greedy_params, token_prompt
    from glassbox.signals import focus

    places = [located(prompt, engine.get_tokenizer()) for prompt in prompts]
    asked = [token_prompt(tokens) for tokens, _ in places]
    found = capture(engine, asked, greedy_params(1), spans=[{SPAN: place} for _, place in places])
    traces = [of_prompt[0] for of_prompt in found.traces]
    nothing = np.full(traces[0].stats.shape[1:3], np.nan)
    rows = [focus.compute(trace).by_place.get("mass", nothing) for trace in traces]
    return np.array(rows, dtype=np.float64), traces[0].layers, traces[0].heads


def _engine_arguments(given: Sequence[str]) -> dict[str, Any]:
    import yaml

    arguments: dict[str, Any] = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or not name.isidentifier():
            raise fail(f"--engine-arg must be NAME=VALUE, got {one[:80]!r}; write such as max_model_len=4096")
        try:
            arguments[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise fail(f"--engine-arg {name} must have a plain value, got {value[:80]!r}; write such as 4096") from None
    return arguments
