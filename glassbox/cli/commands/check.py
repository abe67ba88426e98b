"""The command `glassbox check`. Owns options, output and exit status."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from glassbox.cli.commands.common import fail, one_line_errors
from glassbox.core.printable import printable

if TYPE_CHECKING:
    from glassbox.adapter.layers import ObservedLayers
    from glassbox.config.load import GlassboxConfig
    from glassbox.signals.focus_heads import FocusHeads
    from glassbox.signals.probe import Probe

# Of the most common size today, 7 to 8 billion parameters (Llama 3, Mistral, Qwen 2.5 have 28 to 32 of each).
_DEFAULT_SHAPE: Final = (32, 32)


def check(
    file: Annotated[
        Path | None,
        typer.Argument(help="The YAML file; without it the one that vLLM would find.", show_default=False),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the model: tell which of its layers are observed, and count their time series.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Attention layers.", show_default=False)] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Query heads, of all ranks.", show_default=False)] = None,
    engines: Annotated[int, typer.Option(min=1, help="Engines of the server (data parallel size).")] = 1,
) -> None:
    """Check a configuration file, print what it means, and count the time series it makes.

    The output is YAML again: the file with its defaults filled in, and the count
    as comments; what may be a secret is not shown. What the file names is tried
    here, and nothing of it left behind: paths must exist or can be made. A file
    that can't be used is one line on stderr and exit status 1.

    \b
    Examples:
      glassbox check                              the file that vLLM would find
      glassbox check my.yaml --model models/qwen  time series of that model
      glassbox check my.yaml --layers 80 --heads 64 --engines 2
    """
    import yaml

    from glassbox.cli.commands.check_focus import focus_lines, read_heads
    from glassbox.cli.commands.check_probes import probe_lines, read_probes
    from glassbox.cli.commands.check_rules import rule_lines
    from glassbox.config.load import ConfigError, find_config, replaced_keys
    from glassbox.config.usable import load_usable
    from glassbox.signals.probe_files import require_probes
    from glassbox.web.doors import unusable

    if model is not None and (layers, heads) != (None, None):
        raise fail("--model tells layers and heads; leave out --layers and --heads")
    if (layers is None) != (heads is None):
        raise fail("--layers and --heads must be given together; --model DIRECTORY reads both from config.json")
    try:
        path = find_config() if file is None else file
        config = load_usable(path, also=require_probes)
    except ConfigError as error:
        raise fail(str(error)) from None
    if (problem := unusable(config)) is not None:
        raise fail(f"{path}: {problem}")
    with one_line_errors():
        _check_baseline(config)
        wanted = _Wanted(read_probes(config), read_heads(config))
        shape = _shape(path, config, model, layers, heads, wanted)
    typer.echo(f"# {printable(str(path))}: valid. With the defaults filled in:")
    typer.echo(yaml.safe_dump(_without_secrets(config), sort_keys=False, allow_unicode=True))
    for line in (
        *replaced_keys(config),
        *shape.lines(),
        *_turn_lines(config, shape),
        *probe_lines(config, wanted.probes, shape.places),
        *focus_lines(config, wanted.focus_heads, shape.places),
        *rule_lines(config),
        *_series_lines(config, shape, engines),
    ):
        typer.echo(f"# {line}".rstrip())
    typer.echo(f"# {_vllm_line(config)}")


def _without_secrets(config: "GlassboxConfig") -> dict[str, Any]:
    """The settings as plain values; what may be a secret is left out of a build's log."""
    from glassbox.config.load import hide_secrets

    return hide_secrets(config.model_dump(mode="json"))


def _check_baseline(config: "GlassboxConfig") -> None:
    """Read the baseline as the server will.

    Raises:
        ViewError: it can't be read, or is none.
    """
    from glassbox.signals.baseline import BaselineError, load_baseline
    from glassbox.view.measured import ViewError

    path = config.baseline.expanded_path
    try:
        if path is not None:
            load_baseline(path, own=True)
    except BaselineError as error:
        raise ViewError(str(error)) from None


@dataclass(frozen=True)
class _Wanted:
    """What files that the configuration names ask of the model."""

    probes: "Sequence[Probe]"
    focus_heads: "FocusHeads | None"


@dataclass(frozen=True)
class _Shape:
    """The layers to count for.

    Attributes:
        layer_heads: query heads of each observed one, of all ranks.
        whose: where that comes from.
        found: the model's, as vLLM builds it here; None if it didn't.
        places: query heads of each measured layer of the model, by its index; None if no model was given.
    """

    layer_heads: tuple[int, ...]
    whose: str = ""
    found: "ObservedLayers | None" = None
    places: Mapping[int, int] | None = None

    def lines(self) -> Iterator[str]:
        """Which layers are observed, and why others are not."""
        from glassbox.adapter.coverage import bypass_lines, ranges

        if self.found is None:
            return
        observed, bypassed = self.found.indices, self.found.bypassed
        yield f"Of {len(observed) + len(bypassed)} attention layers {len(observed)} are observed{self.whose}:"
        yield f"  {ranges(observed) or 'none'}"
        for line in bypass_lines(self.found):
            yield f"  {line.text}"


def _shape(
    path: Path,
    config: "GlassboxConfig",
    model: Path | None,
    layers: int | None,
    heads: int | None,
    wanted: _Wanted,
) -> _Shape:
    """The shape to count for, and where it comes from.

    Raises:
        ViewError: the model can't be read, has not the layers that the file names or a probe reads, or has none of the
            focus heads.
    """
    if model is not None:
        return _shape_of(model, path, config, wanted)
    if layers is not None and heads is not None:
        return _Shape((heads,) * layers)
    num_layers, num_heads = _DEFAULT_SHAPE
    return _Shape((num_heads,) * num_layers, " (as of an 8B model; for yours use --model, or --layers and --heads)")


def _shape_of(model: Path, path: Path, config: "GlassboxConfig", wanted: _Wanted) -> _Shape:
    """As vLLM builds the model here; where it can't, as its config.json says, and why."""
    from glassbox.adapter.coverage import selection_lines
    from glassbox.adapter.model_inspection import InspectionError, inspect_model
    from glassbox.cli.commands.check_focus import check_has
    from glassbox.cli.commands.check_probes import check_fit
    from glassbox.cli.commands.model_shape import read_shape
    from glassbox.view.measured import ViewError

    by_file = read_shape(model)  # first: it tells at once that there is no model
    beyond = [index for index in config.sampling.layers.indices or () if index >= by_file.total]
    if beyond:
        named, last = ", ".join(map(str, beyond)), by_file.total - 1
        raise ViewError(
            f"{path}: sampling.layers must name layers of the model, got {named}; its layers are 0 to {last}"
        )
    try:
        found = inspect_model(model, path)
    except InspectionError as error:
        check_fit(wanted.probes, str(model), range(by_file.total), by_file.heads)
        places = dict.fromkeys(config.sampling.layers.select(range(by_file.total)), by_file.heads)
        check_has(wanted.focus_heads, str(model), places)
        why = f" ({model}, by its config.json alone, since vLLM could not build it here: {error})"
        return _Shape((by_file.heads,) * by_file.layers, why, places=places)
    for line in selection_lines(found, config.sampling.layers):
        raise ViewError(f"{path}: {line.text}")
    measured = config.sampling.layers.select(found.indices)
    check_fit(wanted.probes, str(model), measured, found.num_heads)
    places = {layer: heads for layer, heads in zip(found.indices, found.heads, strict=True) if layer in measured}
    check_has(wanted.focus_heads, str(model), places)
    return _Shape(found.heads, f" ({model}, as vLLM builds it here)", found, places)


def _turn_lines(config: "GlassboxConfig", shape: _Shape) -> Iterator[str]:
    """Whether layers that take turns keep the sample rate."""
    from glassbox.adapter.coverage import turn_lines

    observed = range(len(shape.layer_heads)) if shape.found is None else shape.found.indices
    whose = "" if shape.found else shape.whose
    for line in turn_lines(len(config.sampling.layers.select(observed)), config):
        yield f"{line.text}{whose}."


def _vllm_line(config: "GlassboxConfig") -> str:
    """Whether the vLLM of this environment would be observed."""
    from glassbox.adapter.release import TESTED_RANGE, Standing, installed

    found = installed()
    if found.standing is Standing.ABSENT:
        return f"No vLLM in this environment; {TESTED_RANGE} are observed."
    if (reason := found.unobserved_reason(config.compat)) is not None:
        return reason
    if found.standing is Standing.NEWER:
        return (
            f"vLLM {found.version} is not among the tested ones ({TESTED_RANGE}): layers are observed once reproduced."
        )
    return f"vLLM {found.version} is among the tested ones ({TESTED_RANGE})."


def _series_lines(config: "GlassboxConfig", shape: _Shape, engines: int) -> list[str]:
    from glassbox.core.adapter_slots import num_slots
    from glassbox.export.families import adapter_series_count, fitting_detail, series_count
    from glassbox.export.score_families import score_series_count
    from glassbox.store.merge import DETAILS

    prometheus = config.export.prometheus
    drift = config.baseline.path is not None
    shapes = [shape.layer_heads] * engines
    by_adapter = engines * adapter_series_count(num_slots(config.adapters.max))
    of_scores = engines * score_series_count(len(config.probes)) if config.probes else 0
    besides = by_adapter + of_scores
    used, warning = fitting_detail(prometheus.detail, prometheus.max_series, shapes, with_drift=drift, besides=besides)
    many = "1 engine" if engines == 1 else f"{engines} engines"
    heads = sorted(set(shape.layer_heads)) or [0]
    many_heads = f"{heads[0]}" if len(heads) == 1 else f"{heads[0]} to {heads[-1]}"
    whose = "" if shape.found else shape.whose
    lines = [f"Time series of attention, {len(shape.layer_heads)} layers x {many_heads} heads, {many}{whose}:"]
    for detail in DETAILS:
        number = besides + engines * series_count(detail, shape.layer_heads, with_drift=drift)
        notes = ["in effect"] if detail == used else []
        if number > prometheus.max_series:
            notes.append(f"more than max_series {prometheus.max_series}")
        lines.append(f"  detail {detail:5} {number:>12,}   {', '.join(notes)}")
    if by_adapter:
        adapters = f"{config.adapters.max} LoRA adapters, the base model and other"
        lines.append(f"Of each, {by_adapter:,} by adapter ({adapters}).")
    if of_scores:
        lines.append(f"Of each, {of_scores:,} of probes and signals.")
    if warning is not None:
        lines.append(f"Falls back: {warning}")
    if not (config.enabled and prometheus.enabled):
        lines.append("None of them is shown: enabled or export.prometheus.enabled is false.")
    elif not prometheus.on_vllm_port and config.export.own_port is None:
        lines.append(
            "None of them is shown: export.prometheus.on_vllm_port is false, and there is no port of glassbox's own; "
            "set export.http.port."
        )
    return lines
