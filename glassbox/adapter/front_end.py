"""Front ends that vLLM's engine is served behind, as far as glassbox's metrics can't show at theirs.

Owns how they are told, in the process that makes the engine's client. Python's own API server shows whatever is in
prometheus_client's registry; these don't.
"""

import sys
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class FrontEnd:
    """A front end.

    Attributes:
        name: of it, as its operator knows it.
        shows: what it does instead of showing glassbox's metrics.
    """

    name: str
    shows: str


RUST: Final = FrontEnd("vLLM's Rust front end", "answers /metrics without what Python processes measure")
GRPC: Final = FrontEnd("vLLM's gRPC server", "has no /metrics")
DYNAMO: Final = FrontEnd("Dynamo", "hands on vLLM's own metrics alone")


def front_end_of_process() -> FrontEnd | None:
    """The one of these that this process is, in which the client of an engine is made; None for any other.

    What a process is for tells what it has imported: `vllm serve --grpc` its server, `python -m dynamo.vllm` itself.
    """
    for name in list(sys.modules):
        # It has moved within vLLM's entry points, in 0.30.
        if name.startswith("vllm.entrypoints.") and name.endswith(".grpc_server"):
            return GRPC
        if name == "dynamo.vllm":
            return DYNAMO
    return None
