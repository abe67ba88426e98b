"""The model of each of two pipeline stages as vLLM builds it, without an engine; prints which layers glassbox finds.

python -m tests.integration.stage_models FOLDER
"""

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Final

from tests.program import RESULT

STAGES, LAYERS = 2, 7
_MODELS: Final[dict[str, dict[str, object]]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    # Two attention sizes, and layers that are told apart by more than one number in their names.
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 32,
    },
}
_SIZES: Final = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": LAYERS,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "torch_dtype": "bfloat16",
}


def stage_layers(folder: Path, stage: int) -> list[list[object]]:
    """Name and global index of each attention layer that this stage has."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    from glassbox.adapter.layer_numbers import number_layers
    from glassbox.adapter.layers import attention_layers

    config = EngineArgs(str(folder), skip_tokenizer_init=True, load_format="dummy", max_model_len=64)
    vllm_config = config.create_engine_config()
    with set_current_vllm_config(vllm_config):
        parallel_state.initialize_model_parallel()
        whole = parallel_state._PP
        parallel_state._PP = SimpleNamespace(  # type: ignore[assignment]
            rank_in_group=stage, world_size=STAGES, is_first_rank=stage == 0, is_last_rank=stage == STAGES - 1
        )
        model = initialize_model(vllm_config)
        parallel_state._PP = whole
        parallel_state.destroy_model_parallel()
    numbers = number_layers(model, attention_layers(vllm_config, model, None))
    return [[name, number] for name, number in numbers.items()]


def main(folder: Path) -> None:
    """For each model and stage."""
    from vllm.distributed.parallel_state import init_distributed_environment

    with tempfile.NamedTemporaryFile() as store:
        init_distributed_environment(1, 0, f"file://{store.name}", 0, "gloo")
        found = {}
        for name, model in _MODELS.items():
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(json.dumps({**_SIZES, **model}))
            found[name] = [stage_layers(folder / name, stage) for stage in range(STAGES)]
    print(RESULT + json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
