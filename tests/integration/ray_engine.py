"""`parallel_engine` with its ranks in Ray's workers, on a Ray cluster of one node of its own.

    unshare --map-root-user --net --pid --fork --kill-child --mount-proc \\
        python -m tests.integration.ray_engine SPEC.json

In namespaces of its own, because Ray listens at all addresses of a machine and leaves processes behind.
"""

import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.integration.parallel_engine import ParallelSpec, run
from tests.program import write_plugin

RANKS: Final = 2
_PORT: Final = 6379
_SIOCSIFFLAGS: Final = 0x8914
_UP: Final = 0x1 | 0x40  # IFF_UP, IFF_RUNNING
_SHARED_MEMORY_BYTES: Final = 100_000_000


def loopback_up() -> None:
    """Start the only network interface of a fresh namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as of_interfaces:
        fcntl.ioctl(of_interfaces, _SIOCSIFFLAGS, struct.pack("16sh", b"lo", _UP))


def start_cluster(folder: Path) -> None:
    """Start the node, and name it to vLLM.

    Its workers get their environment from it, so that it has nothing of glassbox's: a node was started before whoever
    serves with it.
    """
    address = f"127.0.0.1:{_PORT}"
    options = {"--num-gpus": RANKS, "--num-cpus": RANKS, "--port": _PORT, "--include-dashboard": "false"}
    options |= {"--object-store-memory": _SHARED_MEMORY_BYTES, "--temp-dir": folder}
    subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", *(f"{k}={v}" for k, v in options.items())],
        env={name: value for name, value in os.environ.items() if not name.startswith("GLASSBOX_")},
        check=True,
    )
    os.environ["RAY_ADDRESS"] = address


def main(spec: Path) -> None:
    """Serve with two ranks, as `parallel_engine` does."""
    loopback_up()
    # Else Ray writes a token into the home directory; nobody else can reach this cluster.
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    # Not the test's folder: the paths of Ray's sockets must be short.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        plugins = Path(folder, "plugins")
        write_plugin(plugins, "vllm.platform_plugins", "tests.integration.ray_platform:ray_platform")
        sys.path.insert(0, str(plugins))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(plugins), os.environ.get("PYTHONPATH", "")])
        start_cluster(Path(folder, "node"))
        run(ParallelSpec(**json.loads(spec.read_text())))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
