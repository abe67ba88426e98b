"""All checks, in the order in which they are told; each is a function of what was asked that gives its findings."""

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from glassbox.cli.doctor import (
    configuration,
    kernel,
    packages,
    plugin_loading,
    prometheus_targets,
    protection,
    run_directories,
    served_metrics,
)
from glassbox.cli.doctor.finding import Finding, unknown
from glassbox.cli.doctor.question import Question

Check = Callable[[Question], Iterable[Finding]]

INSTALLATION: Final[tuple[Check, ...]] = (
    packages.python_version,
    packages.requirements,
    packages.vllm_release,
    packages.vllm_metadata,
    packages.torch_fits,
    packages.torch_place,
    packages.vllm_imports,
    plugin_loading.entry_point,
    plugin_loading.named,
    plugin_loading.switched_off,
    configuration.found,
    configuration.valid,
    configuration.suits_model,
    kernel.compiler,
    kernel.cache,
    kernel.compiled,
)
RUNNING: Final[tuple[Check, ...]] = (
    run_directories.servers,
    run_directories.shared,
    run_directories.directories,
    served_metrics.reachable,
    served_metrics.shown,
    served_metrics.versions,
    served_metrics.configuration,
    served_metrics.start,
    served_metrics.layers,
    served_metrics.sampling,
    served_metrics.errors,
    protection.vllm_port,
    protection.own_port,
    prometheus_targets.scraping,
)


def examine(question: Question, checks: Iterable[Check] = (*INSTALLATION, *RUNNING)) -> Iterator[Finding]:
    """The findings of all checks; one that fails itself is a finding as well, and keeps none of the others."""
    for check in checks:
        try:
            yield from check(question)
        except Exception as problem:
            area = check.__module__.rpartition(".")[2]
            why = f"the check {area}.{check.__name__} failed: {type(problem).__name__}: {problem}"
            yield unknown("doctor.check", why, "a bug, or a strange system: report it with this line")
