"""The YAML file: which one it is and why, whether it can be used, and whether it suits the model."""

import logging
from collections.abc import Iterator
from typing import Final

from glassbox.cli.doctor.finding import Finding, error, ok, unknown, warning
from glassbox.cli.doctor.question import Question
from glassbox.config.load import CONFIG_ENV, ConfigError, GlassboxConfig, packaged_config

_FALLS_BACK: Final = "glassbox check FILE --model DIRECTORY tells how many series each detail makes"


def found(question: Question) -> Iterator[Finding]:
    """Which file is looked at, and whether a running server has another one."""
    try:
        path = question.config_path
    except ConfigError as bad:
        yield error("config.found", str(bad), "a server that is started here stops with this line")
        return
    if question.config is not None:
        why = "named by --config"
    elif question.server is not None:
        why = f"of the server {question.server.pid}"
    elif question.environ.get(CONFIG_ENV):
        why = f"named by {CONFIG_ENV}"
    else:
        why = "the packaged default" if path == packaged_config() else "in the working directory"
    server = question.server
    theirs = None if server is None else server.config_path
    if server is not None and theirs is not None and theirs.absolute() != path.absolute():
        seen = f"{path} ({why}), but the server {server.pid} uses {theirs}"
        yield warning("config.found", seen, f"start the server with {CONFIG_ENV}={path.absolute()}")
    else:
        yield ok("config.found", f"{path} ({why})")


def valid(question: Question) -> Iterator[Finding]:
    """It can be read and used."""
    loaded = question.loaded
    if isinstance(loaded, ConfigError):
        yield error("config.valid", str(loaded), "mend it; `glassbox check` tries it again")
        return
    yield ok("config.valid", f"{question.config_path} is valid")
    if not loaded.enabled:
        yield warning("config.enabled", "`enabled: false`: nothing is observed", "set enabled: true and restart")
    elif loaded.sample_rate == 0:
        remedy = "set sample_rate above 0; it takes effect within two seconds"
        yield warning("config.enabled", "sample_rate is 0: no step is measured", remedy)
    else:
        yield ok("config.enabled", f"enabled, sample_rate {loaded.sample_rate:g}")


def suits_model(question: Question) -> Iterator[Finding]:
    """With --model: which layers would be observed, whether those that are chosen exist, how many series there are."""
    name = "config.model"
    config = question.valid_config
    if question.model is None:
        yield unknown(name, "no --model was given", "glassbox doctor --model DIRECTORY")
        return
    if config is None:
        yield unknown(name, "there is no valid configuration")
        return
    from glassbox.adapter.model_inspection import InspectionError, inspect_model
    from glassbox.cli.commands.model_shape import read_shape
    from glassbox.view.measured import ViewError

    try:
        by_file = read_shape(question.model)
    except (ViewError, OSError) as problem:
        yield error(name, str(problem), "--model needs the folder of a model")
        return
    try:
        layers = inspect_model(question.model, question.config_path)
    except InspectionError as problem:
        yield unknown(name, f"vLLM could not build {question.model} here: {problem}", "see vllm.import")
        yield from _series(config, (by_file.heads,) * by_file.layers)
        return
    from glassbox.adapter.coverage import bypass_lines, selection_lines, turn_lines

    observed, all_layers = len(layers.indices), len(layers.indices) + len(layers.bypassed)
    why = "; ".join(line.text for line in bypass_lines(layers))
    remedy = "docs/runbooks/GlassboxNothingObserved.md says what helps"
    if not observed:
        yield warning(name, f"none of {all_layers} attention layers would be observed. {why}", remedy)
    elif observed < all_layers:
        yield warning(name, f"{observed} of {all_layers} attention layers would be observed. {why}", remedy)
    else:
        yield ok(name, f"all {observed} attention layers would be observed")
    for line in selection_lines(layers, config.sampling.layers):
        yield warning("config.layers", line.text, "name layers that are observed in sampling.layers")
    for line in turn_lines(len(config.sampling.layers.select(layers.indices)), config):
        if line.level >= logging.WARNING:
            yield warning("config.layers", line.text, "raise sampling.layers_per_step, or lower sample_rate")
    yield from _series(config, layers.heads)


def _series(config: GlassboxConfig, heads: tuple[int, ...]) -> Iterator[Finding]:
    from glassbox.export.families import fitting_detail

    prometheus = config.export.prometheus
    used, why = fitting_detail(
        prometheus.detail, prometheus.max_series, [heads], with_drift=config.baseline.path is not None
    )
    if why is not None:
        yield warning("config.series", why, _FALLS_BACK)
    else:
        yield ok("config.series", f"detail {used} fits max_series {prometheus.max_series}")
