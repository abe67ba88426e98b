"""Imports in a process of its own, one after the other, with a bound of time: a crash there is an answer here."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

# The first import of torch and vLLM on a cold disk; with warm ones it takes 10 to 20 s.
TIMEOUT_S: Final = 180.0
_MAX_CHARACTERS: Final = 1 << 20
_BEGIN, _END = "DOCTOR BEGIN ", "DOCTOR END "
_PROGRAM: Final = f"""
import importlib, json, sys
for name in sys.argv[1:]:
    print({_BEGIN!r} + name, flush=True)
    try:
        module, _, call = name.partition(":")
        found = importlib.import_module(module)
        if call:
            getattr(found, call)()
        error = ""
    except BaseException as problem:
        error = type(problem).__name__ + ": " + str(problem)
    print({_END!r} + json.dumps([name, error]), flush=True)
"""


@dataclass(frozen=True)
class Imported:
    """How it went.

    Attributes:
        errors: by name; empty for what worked. Names that weren't come to are not there.
        died: what ended the process, or its time, before the end; empty if nothing did.
        last: name that was being imported then.
    """

    errors: Mapping[str, str]
    died: str = ""
    last: str = ""


def try_imports(
    names: Sequence[str], environ: Mapping[str, str] | None = None, timeout_s: float = TIMEOUT_S
) -> Imported:
    """Import modules; `module:function` also calls the function, without arguments.

    Args:
        names: in this order; one that fails does not keep the next ones from being tried.
        environ: of the process. Default: this one's.
    """
    # -P: a file of the working directory must not shadow a module.
    command = [sys.executable, "-P", "-c", _PROGRAM, *names]
    environ = {**(os.environ if environ is None else environ), "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    died = ""
    with subprocess.Popen(
        command,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        errors="replace",
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout_s)
            if process.returncode < 0:
                died = f"killed by signal {-process.returncode}"
            elif process.returncode:
                died = f"exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            died = f"not done within {timeout_s:g} s"
    return _read(output[:_MAX_CHARACTERS], died)


def _read(output: str, died: str) -> Imported:
    errors: dict[str, str] = {}
    last = ""
    for line in output.splitlines():
        if line.startswith(_BEGIN):
            last = line.removeprefix(_BEGIN)
        elif line.startswith(_END):
            name, error = json.loads(line.removeprefix(_END))
            errors[name] = error
    return Imported(errors, died, last if died and last not in errors else "")
