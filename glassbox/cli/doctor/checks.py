"""All checks, in the order in which they are told; each is a function of what was asked that gives its findings."""

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from glassbox.cli.doctor import (
    configuration,
    doors,
    kernel,
    packages,
    plugin,
    prometheus,
    run_directories,
    server,
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
    packages.vllm_imports,
    plugin.entry_point,
    plugin.named,
    plugin.switched_off,
    configuration.found,
    configuration.valid,
    configuration.suits_model,
    kernel.compiler,
    kernel.cache,
    kernel.compiled,
)
RUNNING: Final[tuple[Check, ...]] = (
    run_directories.servers,
    run_directories.directories,
    server.reachable,
    server.shown,
    server.versions,
    server.configuration,
    server.layers,
    server.sampling,
    server.errors,
    doors.vllm_port,
    doors.own_port,
    prometheus.scraping,
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
