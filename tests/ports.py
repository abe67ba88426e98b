"""Ports for tests: `free_port` gives none that a test beside this one, in another process, has been given."""

import socket
from typing import Final

from glassbox.cli.demo import ports

# Names in the kernel, which go with this process: a port is its test's from when it is chosen until it listens.
_TAKEN: Final[list[socket.socket]] = []


def free_port() -> int:
    """A TCP port of the loopback interface that is this process's alone, as long as it lives."""
    while True:
        port = ports.free_port()
        name = socket.socket(socket.AF_UNIX)
        try:
            name.bind(f"\0glassbox-tests-port-{port}")
        except OSError:
            name.close()
            continue
        _TAKEN.append(name)
        return port
