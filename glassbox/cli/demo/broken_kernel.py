"""An attention kernel that breaks while it serves: from some moment on one head's output is too large in one layer.

A vLLM plugin of its own, apart from glassbox's: `glassbox demo --incident` gives it to the server that it will break,
and nobody else has it. It wraps vLLM's kernel for CPUs as a bad build of it would behave, and knows nothing of who is
watching.
"""

import os
from functools import wraps
from pathlib import Path
from typing import Any, Final

BROKEN_LAYER: Final = 12
BROKEN_HEAD: Final = 4
BROKEN_BY: Final = 1.1

# Names the file whose existence is the moment.
_SWITCH: Final = "GLASSBOX_DEMO_BROKEN_KERNEL"
_PLUGIN: Final = "glassbox_demo_broken_kernel"


def plugin_environment(folder: Path) -> dict[str, str | None]:
    """What a server needs to load the plugin, whose files are written to `folder`; it is healthy for the time being.

    vLLM finds plugins by their metadata, wherever Python looks for modules.
    """
    metadata = folder / f"{_PLUGIN}-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {_PLUGIN}\nVersion: 0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(
        f"[vllm.general_plugins]\n{_PLUGIN} = {__name__}:{register.__name__}\n", encoding="utf-8"
    )
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), _SWITCH: str(_switch(folder))}


def break_kernel(folder: Path) -> None:
    """The moment: from the next step on the kernel of that folder's server is broken."""
    _switch(folder).touch()


def _switch(folder: Path) -> Path:
    return folder / "broken"


def register() -> None:
    """The plugin, called by vLLM in each of its processes."""
    if _SWITCH not in os.environ:
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    switch = Path(os.environ[_SWITCH])
    CPUAttentionBackendImpl.forward = breaking(CPUAttentionBackendImpl.forward, switch.exists)


def breaking(forward: Any, is_broken: Any) -> Any:
    """An impl's `forward` that is broken while `is_broken()`."""

    @wraps(forward)
    def wrapped(impl: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(impl, layer, *args, **kwargs)
        if f".{BROKEN_LAYER}." in layer.layer_name and is_broken():
            output.view(len(output), impl.num_heads, -1)[:, BROKEN_HEAD] *= BROKEN_BY
        return output

    return wrapped
