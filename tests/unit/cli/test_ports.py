"""Ports for servers that listen only later: free, and nobody else's meanwhile."""

import socket
from pathlib import Path

import pytest

from glassbox.cli.demo import ports
from tests.ports import free_port


class TestFreePort:
    def test_none_that_the_kernel_gives(self) -> None:
        """To a connection or a server that asks for any: between choosing and listening lie minutes."""
        low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
        if low <= ports._LOWEST:
            pytest.skip(f"this machine gives all ports from {low} on to whoever asks for any")
        found = [ports.free_port() for _ in range(20)]
        assert not [port for port in found if low <= port <= high]
        with socket.create_server((ports.HOST, found[0])) as server:
            assert found[0] == server.getsockname()[1]

    def test_none_that_is_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """By a server on this interface, or on all."""
        first = ports.free_port()
        for host in (ports.HOST, ""):
            with socket.create_server((host, first)):
                monkeypatch.setattr(ports, "_candidates", lambda: range(first, first + 2))
                assert first != ports.free_port()

    @pytest.mark.parametrize("told", [None, "", "1024 65535", "soon later"])
    def test_where_the_kernel_gives_all_or_does_not_say(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str | None
    ) -> None:
        """One that is free at the moment."""
        path = tmp_path / "range"
        if told is not None:
            path.write_text(told)
        monkeypatch.setattr(ports, "_GIVEN_BY_THE_KERNEL", path)
        with socket.create_server((ports.HOST, ports.free_port())):
            pass

    def test_of_tests_each_has_its_own(self) -> None:
        """Though none listens yet."""
        assert 50 == len({free_port() for _ in range(50)})
