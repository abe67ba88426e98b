"""vLLM's servers of this user on this machine, as /proc shows them: how they were started, and where they leave files.

A server's own process tells more than the shell that doctor is started from: that one may have other variables.
"""

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from glassbox.config.load import CONFIG_ENV, ConfigError, GlassboxConfig, load_config, packaged_config
from glassbox.store.rundir import RUN_DIR_ENV

_PROC: Final = Path("/proc")
_MAX_BYTES: Final = 1 << 20
_DEFAULT_PORT: Final = 8000
_LISTENING: Final = "0A"


@dataclass(frozen=True)
class LocalServer:
    """The first process of a server.

    Attributes:
        pid: of it.
        words: of its command line.
        environ: as it was started.
        cwd: its working directory; None if it can't be told.
        run_dir: of the server, by the environment of its children; None if none of them has it.
    """

    pid: int
    words: Sequence[str]
    environ: Mapping[str, str]
    cwd: Path | None
    run_dir: Path | None

    @property
    def port(self) -> int:
        """It was told to listen on."""
        text = self.option("--port")
        return int(text) if text is not None and text.isdecimal() else _DEFAULT_PORT

    @property
    def url(self) -> str:
        """By which this machine reaches it."""
        host = self.option("--host") or "127.0.0.1"
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        scheme = "http" if self.option("--ssl-certfile") is None else "https"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"

    def option(self, name: str) -> str | None:
        """Value of an option of its command line."""
        for word, after in zip(self.words, [*self.words[1:], ""], strict=True):
            if word == name:
                return after
            if word.startswith(f"{name}="):
                return word.partition("=")[2]
        return None

    @property
    def config_path(self) -> Path | None:
        """The YAML file that it has found; None if that can't be told."""
        if self.cwd is None:
            return None
        # As `find_config` does in the server's working directory.
        if named := self.environ.get(CONFIG_ENV):
            return self.cwd / Path(named).expanduser()
        local = self.cwd / "glassbox.yaml"
        return local if os.path.lexists(local) and not local.is_dir() else packaged_config()

    @property
    def own_port(self) -> int | None:
        """That its YAML gives to glassbox."""
        return None if self.config_path is None else own_port(loaded(self.config_path))

    @property
    def front_end(self) -> str | None:
        """That hides what Python's processes measure; None if it is vLLM's own API server."""
        if self.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in {"", "0"}:
            return "vLLM's Rust front end (VLLM_USE_RUST_FRONTEND)"
        if "--grpc" in self.words:
            return "vLLM's gRPC server (--grpc)"
        return "Dynamo (dynamo.vllm)" if "dynamo.vllm" in self.words else None


def loaded(path: Path) -> GlassboxConfig | ConfigError:
    """What a file says, or why it can't be used."""
    try:
        return load_config(path)
    except ConfigError as bad:
        return bad


def own_port(config: GlassboxConfig | ConfigError) -> int | None:
    """The port that a configuration gives to glassbox, None if none."""
    return None if isinstance(config, ConfigError) else config.export.own_port


def local_servers() -> list[LocalServer]:
    """All of this user's, by process id; empty where there is no /proc."""
    parents: dict[int, int] = {}
    run_dirs: dict[int, Path] = {}
    found: list[tuple[int, list[str], dict[str, str]]] = []
    for pid in _own_pids():
        with contextlib.suppress(OSError, ValueError):  # it ended meanwhile
            words = _strings(pid, "cmdline")
            environ = dict(_pair(text) for text in _strings(pid, "environ"))
            parents[pid] = int((_PROC / f"{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
            if named := environ.get(RUN_DIR_ENV):
                run_dirs[pid] = Path(named)
            if _is_server(words):
                found.append((pid, words, environ))
    own = {pid for pid, _, _ in found}
    first = [entry for entry in found if parents.get(entry[0]) not in own]
    return [
        LocalServer(pid, words, environ, _cwd(pid), run_dirs.get(pid) or _of_children(pid, parents, run_dirs))
        for pid, words, environ in sorted(first)
    ]


def listening_addresses(port: int) -> list[str]:
    """Addresses of this machine on which somebody listens at that port; empty where the kernel doesn't tell."""
    addresses: set[str] = set()
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in (_PROC / "net" / name).read_text().splitlines()[1:]:
                _, local, _, state, *_ = line.split()
                address, _, number = local.partition(":")
                if state == _LISTENING and int(number, 16) == port:
                    # Words of 4 bytes in the machine's order.
                    words = [bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8)]
                    addresses.add(socket.inet_ntop(family, b"".join(words)))
    return sorted(addresses)


def _is_server(words: Sequence[str]) -> bool:
    """Its first process, which keeps its command line; the others call themselves VLLM::..."""
    programs = [Path(word).name for word in words[:4]]
    if "dynamo.vllm" in words[:4]:
        return True
    if any(word.startswith("vllm.entrypoints.") and word.endswith("api_server") for word in words[:4]):
        return True
    return ("vllm" in programs or "vllm.entrypoints.cli.main" in words[:4]) and "serve" in words[:5]


def _own_pids() -> Iterator[int]:
    with contextlib.suppress(OSError), os.scandir(_PROC) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.name.isdecimal() and entry.stat().st_uid == os.geteuid():
                    yield int(entry.name)


def _strings(pid: int, name: str) -> list[str]:
    with (_PROC / f"{pid}" / name).open("rb") as file:
        return file.read(_MAX_BYTES).decode(errors="replace").split("\0")[:-1]


def _pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name, value


def _cwd(pid: int) -> Path | None:
    try:
        return Path(os.readlink(_PROC / f"{pid}/cwd"))
    except OSError:
        return None


def _of_children(pid: int, parents: Mapping[int, int], run_dirs: Mapping[int, Path]) -> Path | None:
    for child, named in sorted(run_dirs.items()):
        at: int | None = child
        while at is not None and at != pid:
            at = parents.get(at)
        if at == pid:
            return named
    return None
