"""Ports for servers that listen only later: which nobody else is given meanwhile.

A port of the range that the kernel gives to whoever asks for any port is free only for a moment: the next outgoing
connection may have it, and vLLM takes a minute to start.
"""

import random
import socket
from pathlib import Path
from typing import Final

HOST: Final = "127.0.0.1"
_LOWEST: Final = 10_000  # below are those of well-known services
_TRIES: Final = 1000
_GIVEN_BY_THE_KERNEL: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """A TCP port that is free on the loopback interface, and that no connection will be given."""
    candidates = _candidates()
    for port in random.sample(candidates, min(len(candidates), _TRIES)):
        if _is_free(port):
            return port
    with socket.socket() as probe:  # where the kernel gives all there are, or doesn't say
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _candidates() -> range:
    try:
        low, _high = map(int, _GIVEN_BY_THE_KERNEL.read_text().split())
    except (OSError, ValueError):
        return range(0)
    return range(_LOWEST, low)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True
