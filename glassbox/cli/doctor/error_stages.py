"""What helps when a stage of glassbox had errors: the table of docs/runbooks/GlassboxErrors.md in a line each."""

from collections.abc import Iterator, Mapping
from typing import Final

from glassbox.cli.doctor.finding import Finding, ok, warning

_RUN_DIRECTORY: Final = "make room on the disk of the run directory, or restore it by a restart of the server"
_REMEDIES: Final[Mapping[str, str]] = {
    "snapshot": _RUN_DIRECTORY,
    "traces": _RUN_DIRECTORY,
    "read": _RUN_DIRECTORY,
    "status": _RUN_DIRECTORY,
    "prometheus": _RUN_DIRECTORY,
    "multiprocess": "make room on the disk of PROMETHEUS_MULTIPROC_DIR, and let this user write there",
    "page": _RUN_DIRECTORY,
    "access": "mend the file of export.http that the log names; include_text needs a port that asks who comes",
    "connections": "find out who holds the connections to glassbox's own port, or raise export.http.max_connections",
    "http": "let glassbox have the port that the YAML names, or choose another: someone else listens there",
    "otel": "see that the collector of export.otel.endpoint is there and takes this protocol and these headers",
    "otel_traces": "as for otel; or export.otel.traces: false",
    "jsonl": "make room on the disk of export.jsonl.path, and let this user write there",
    "records": "make room on the disk of requests.records.path, let this user write there; parquet needs pyarrow",
    "probes": "name files of glassbox train in probes, that this user may read",
    "scores": "mend the probe or the file of heads that the log names, or make room on the disk of the run directory",
    "actions": "mend the probe that the log names, or make room on the disk of the run directory",
    "audit": "make room on the disk of actions.audit.path, and let this user write there",
    "baseline": "make a baseline of this model with this glassbox: glassbox baseline save",
    "kernel": "install g++, or name a compiler by CXX; see kernel.compiler, kernel.cache and kernel.compiled",
    "exporter": "see the log for why its process can't be started: memory, limit of processes",
    "probe": "the GPU's memory is full: lower --gpu-memory-utilization",
    "prompt": "ask for fewer layers or heads of whole prompts, leave cudagraph_mode at its default, and as for probe",
    "canary": "the GPU's memory is full: lower --gpu-memory-utilization",
    "adapters": "this vLLM tells of LoRA adapters otherwise: look for a newer glassbox, or set adapters: {max: 0}",
    "batch": "this vLLM orders batches otherwise: look for a newer glassbox",
}
_BUG: Final = "a bug: report it with the line of the server's log; sample_rate: 0 ends it until then"
_RUNBOOK: Final = "docs/runbooks/GlassboxErrors.md"


def stage_findings(name: str, errors: Mapping[str, float]) -> Iterator[Finding]:
    """One for each stage that had errors.

    Args:
        name: id of the findings.
        errors: by stage.
    """
    failed = {stage: count for stage, count in errors.items() if count > 0}
    for stage, count in sorted(failed.items()):
        remedy = f"{_REMEDIES.get(stage, _BUG)} ({_RUNBOOK})"
        yield warning(name, f"{count:g} errors in stage {stage} since the start", remedy)
    if not failed:
        yield ok(name, "no errors since the start")
