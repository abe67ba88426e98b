"""A vLLM of the future for tests: the installed one with some internals changed, called 0.99.0, serving as it does.

    python tests/releases/future.py FOLDER VARIANT...

The folder can be put in front of PYTHONPATH as that of a kept release. Files that don't change are links to those of
the installed one. Each variant is what a release may well do, since none of it is promised to anybody; its users inside
of vLLM are changed with it, so that tokens stay what they are.
"""

import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tools.vllm_releases import installed

VERSION: Final = "0.99.0"


@dataclass(frozen=True)
class Edit:
    """A change of one file of vLLM.

    Attributes:
        file: below `vllm/`.
        pattern: regular expression; it must be there.
        new: what takes its place, everywhere.
    """

    file: str
    pattern: str
    new: str

    def apply(self, text: str) -> str:
        """The changed text.

        Raises:
            ValueError: the pattern is not there; the installed vLLM is another than this was written for.
        """
        changed, times = re.subn(self.pattern, self.new, text, flags=re.MULTILINE)
        if not times:
            raise ValueError(f"{self.file} must have {self.pattern!r}; mend the variant in tests/releases/future.py")
        return changed


_RELEASE: Final = (
    Edit("_version.py", r"'\d+\.\d+\.\d+'", f"'{VERSION}'"),
    Edit("_version.py", r"= \(\d+, \d+, \d+\)", f"= ({VERSION.replace('.', ', ')})"),
)
_CPU_ATTENTION: Final = "v1/attention/backends/cpu_attn.py"
_LAYER_BASE: Final = "model_executor/layers/attention_layer_base.py"


def _cache(bound: str, read: str, zeroed: str) -> tuple[Edit, ...]:
    """Layers whose cache has another shape than what the kernels are given.

    Args:
        bound: of the `kv_cache` as it is allocated, [blocks, Hkv, block, 2 * D].
        read: `key_cache, value_cache` of that, [blocks, Hkv, block, D] each.
        zeroed: a block of it, of `kv` and `block_id`.
    """
    split = (
        r"        num_blocks, num_kv_heads, block_size, _ = kv_cache\.size\(\)\n"
        r"        kv_cache = kv_cache\.view\(\(num_blocks, num_kv_heads, block_size \* 2, -1\)\)\n"
        r"        key_cache, value_cache = kv_cache\.chunk\(2, dim=2\)\n"
    )
    return (
        Edit(_LAYER_BASE, r"self\.kv_cache = kv_cache$", f"self.kv_cache = {bound}"),
        Edit(_CPU_ATTENTION, split, f"        key_cache, value_cache = {read}\n"),
        Edit("v1/worker/cpu_model_runner.py", r"kv\[block_id\]\.zero_\(\)", f"{zeroed}.zero_()"),
    )


VARIANTS: Final[Mapping[str, Sequence[Edit]]] = {
    # What only texts of traced requests and spans by message need.
    "optional": (
        Edit("v1/worker/gpu_input_batch.py", r"^    output_token_ids: list", "    sampled_token_ids: list"),
        Edit("v1/worker/gpu_input_batch.py", r"\b(self|request)\.output_token_ids\b", r"\1.sampled_token_ids"),
        Edit("v1/worker/gpu_model_runner.py", r"\breq_state\.output_token_ids\b", "req_state.sampled_token_ids"),
        Edit("v1/worker/gpu_model_runner.py", r"^( +)output_token_ids=\[\],", r"\1sampled_token_ids=[],"),
        Edit("entrypoints/openai/chat_completion/serving.py", r"\brender_chat_request\(", "render_chat("),
        Edit("entrypoints/anthropic/serving.py", r"self\.render_chat_request\(", "self.render_chat("),
    ),
    # A step has another name, in both model runners.
    "core": (
        Edit("v1/worker/gpu_model_runner.py", r"def execute_model\(", "def execute_step("),
        Edit("v1/worker/gpu/model_runner.py", r"(def |self\.)execute_model\(", r"\1execute_step("),
        Edit("v1/worker/mm_encoder_model_runner.py", r"def execute_model\(", "def execute_step("),
        Edit("v1/worker/gpu_worker.py", r"self\.model_runner\.execute_model\(", "self.model_runner.execute_step("),
    ),
    # [Hkv, blocks, block, 2 * D]
    "transposed": _cache(
        bound="kv_cache.transpose(0, 1)",
        read=(
            "kv_cache.transpose(0, 1).view(kv_cache.shape[1], kv_cache.shape[0], kv_cache.shape[2] * 2, -1)"
            ".chunk(2, dim=2)"
        ),
        zeroed="kv[:, block_id]",
    ),
    # [2, blocks, Hkv, block, D], as it was before 0.23
    "halves": _cache(
        bound=(
            "kv_cache.view(*kv_cache.shape[:2], kv_cache.shape[2] * 2, kv_cache.shape[3] // 2)"
            ".unflatten(2, (2, -1)).movedim(2, 0)"
        ),
        read="kv_cache.unbind(0)",
        zeroed="kv[:, block_id]",
    ),
    # One more argument for all builders; those of vLLM need it.
    "builder": (
        Edit(_CPU_ATTENTION, r"^        fast_build: bool = False,\n    \) -> CPU", (
            "        step_plan: dict,\n        fast_build: bool = False,\n    ) -> CPU"
        )),
        Edit(
            _CPU_ATTENTION,
            r"^        num_reqs = common_attn_metadata\.num_reqs$",
            '        num_reqs = step_plan["num_reqs"]',
        ),
        Edit(
            "v1/worker/utils.py",
            r"self\._with_kernel_block_table\(common_attn_metadata, ubatch_idx\),\n            \*\*kwargs,",
            'self._with_kernel_block_table(common_attn_metadata, ubatch_idx),\n'
            '            {"num_reqs": common_attn_metadata.num_reqs},\n            **kwargs,',
        ),
    ),
}  # fmt: skip


def make_future(folder: Path, *variants: str) -> Path:
    """Write the installed vLLM with these variants' changes into a folder, and return the folder.

    Raises:
        ValueError: there is no such variant, or the installed vLLM doesn't have what it changes.
    """
    for variant in variants:
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    source = installed()
    assert source is not None, "no vLLM is installed"
    shutil.copytree(source / "vllm", folder / "vllm", copy_function=os.symlink)
    texts: dict[str, str] = {}
    for edit in (*_RELEASE, *(edit for variant in variants for edit in VARIANTS[variant])):
        before = texts.get(edit.file) or (source / "vllm" / edit.file).read_text(encoding="utf-8")
        texts[edit.file] = edit.apply(before)
    for file, text in texts.items():
        path = folder / "vllm" / file
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
            compiled.unlink()
        path.unlink()
        path.write_text(text, encoding="utf-8")
    info = folder / f"vllm-{VERSION}+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: vllm\nVersion: {VERSION}+cpu\n", encoding="utf-8")
    return folder


if __name__ == "__main__":
    make_future(Path(sys.argv[1]), *sys.argv[2:])
