"""A name of a process that no other process ever has, by which others see whether it still lives.

    <pid>-<start time>-<pid namespace>-<machine>

pid and start time (clock ticks since boot) can't be taken for another process once the pid is used again. The pid
namespace is there because containers may share a /tmp, and only within one namespace does "no such process" mean that
it is dead; the machine, because machines may share a file system. Needs /proc (Linux), as vLLM's servers do.
"""

import functools
import os
import re
import uuid
from pathlib import Path
from typing import Final

PATTERN: Final = r"(?P<pid>\d+)-(?P<start>\d+)-(?P<place>\d+-[0-9a-f]{8})"
_BEGIN: Final = re.compile(PATTERN)


def own_name() -> str:
    """Of this process."""
    pid = os.getpid()
    return f"{pid}-{_start_time(pid)}-{own_place()}"


def own_place() -> str:
    """Where this process's ids mean something: pid namespace and machine."""
    return f"{Path('/proc/self/ns/pid').stat().st_ino}-{_machine()}"


def is_dead(name: str) -> bool:
    """True if the process has ended whose name a text begins with; False for another place's, and for other texts."""
    match = _BEGIN.match(name)
    return match is not None and match["place"] == own_place() and _start_time(int(match["pid"])) != int(match["start"])


def pid_of(name: str) -> str:
    """The process id, for messages; `unknown` if the text is no name."""
    match = _BEGIN.match(name)
    return match["pid"] if match is not None else "unknown"


@functools.cache
def _machine() -> str:
    """Of the running kernel: the pid namespace of a machine's first process has the same number on every machine."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8")
    except OSError:  # some sandboxes lack it
        text = uuid.uuid5(uuid.NAMESPACE_DNS, os.uname().nodename).hex
    return text.replace("-", "").strip()[:8]


def _start_time(pid: int) -> int | None:
    """Clock ticks from boot to the start of process `pid`; None if there is none, or it has ended and nobody has
    asked for its status."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field, the command, is in parentheses and may itself hold blanks and parentheses.
    fields = text.rpartition(")")[2].split()
    state, start = fields[0], fields[19]  # fields 3 and 22
    return None if state in {"Z", "X"} else int(start)
