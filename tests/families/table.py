"""The table of families: a row each, and a model each."""

from typing import Final

from tests.families.family import CROSS, ENCODER, Family, Kind, Part, Task, Truth

_EXPERTS: Final = {"num_local_experts": 4, "num_experts_per_tok": 2}
_NAMED_EXPERTS: Final = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# As DeepSeek's models have them: the first layer without, and one expert for every token.
_ROUTED_EXPERTS: Final = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
# The only sizes that vLLM's kernel for CPUs has, and the only rotation that it serves rightly: others take a query's
# rotary part, which is a strided view, for a contiguous tensor.
_LATENT: Final = {
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32, "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    },
}  # fmt: skip
_MAMBA: Final = {"mamba_n_heads": 8, "mamba_d_state": 16}
_WINDOWS: Final = {"sliding_window": 32, "num_hidden_layers": 4}
_HALF_WINDOWS: Final = (Part(Kind.WINDOW, (0, 2)), Part(Kind.CAUSAL, (1, 3)))
_MOST_WINDOWS: Final = (Part(Kind.WINDOW, (0, 1, 2)), Part(Kind.CAUSAL, (3,)))
# One after the other: vLLM's Mamba2 for CPUs fails on several prompts in one step.
_ALONE: Final = False

_DENSE: Final = (
    Family("Llama", "llama", settings={"head_dim": 32}),
    Family("Llama of head size 80", "llama", "head size 80", settings={"head_dim": 80}),
    Family("Llama of head size 96", "llama", "head size 96", settings={"head_dim": 96}),
    Family("Llama of head size 112", "llama", "head size 112", settings={"head_dim": 112}),
    Family(
        "Llama by transformers", "llama", "`model_impl=transformers`", settings={"head_dim": 32},
        serving={"model_impl": "transformers"},
    ),
    Family("Qwen2", "qwen2", "biases of q, k, v"),
    Family("Qwen3", "qwen3", "q and k normalised", settings={"head_dim": 32}),
    Family("Ministral 3", "ministral3", settings={"head_dim": 32}),
    Family("Phi", "phi", "rotates a part of the head"),
    Family("Phi-3", "phi3", "q, k and v in one", settings={"pad_token_id": 0}),
    Family("GLM", "glm", "rotates a part of the head", settings={"head_dim": 32, "pad_token_id": 0}),
    Family("GLM-4", "glm4", "norms around attention", settings={"head_dim": 32, "pad_token_id": 0}),
    Family("Granite", "granite", "a scale of its own", settings={"attention_multiplier": 0.1}),
    Family("Gemma", "gemma", settings={"head_dim": 32}),
    Family("GPT-NeoX", "gpt_neox", "attention beside the MLP", without=["num_key_value_heads"]),
    Family(
        "MPT", "mpt", "ALiBi", (Part(Kind.ALIBI, (0, 1)),),
        settings={"d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": 512},
        unserved="was supported in vLLM until v0.28.0",
    ),
    Family(
        "GPT-J", "gptj", "attention beside the MLP",
        settings={"n_embd": 128, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 512},
    ),
    Family(
        "GPT-2", "gpt2", "learned positions",
        settings={"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512},
    ),
    Family("OPT", "opt", "learned positions", settings={"ffn_dim": 128, "word_embed_proj_dim": 128}),
    Family("Cohere", "cohere", "attention beside the MLP"),
    Family("OLMo", "olmo", "norms without weights"),
    Family("OLMo 2", "olmo2", "norms after attention"),
    Family("StableLM", "stablelm", "rotates a part of the head"),
    Family("Nemotron", "nemotron", "LayerNorm1p", settings={"head_dim": 32}),
    Family("Ernie 4.5", "ernie4_5", settings={"head_dim": 32}),
    Family("Hunyuan", "hunyuan_v1_dense", "q and k normalised", settings={"head_dim": 32}),
    Family("Seed-OSS", "seed_oss", settings={"head_dim": 32}),
    Family(
        "Apertus", "apertus", "xIELU, q and k normalised",
        together=_ALONE, truth=Truth.QUERIES, differs="transformers' xIELU gives other numbers",
    ),
    Family("Arcee", "arcee", settings={"head_dim": 32}),
    Family(
        "SmolLM3", "smollm3", "each fourth layer without positions",
        (Part(Kind.CAUSAL, (0, 1, 2, 3)),),
        settings={"num_hidden_layers": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    ),
)  # fmt: skip

_SILU: Final = {"hidden_act": "silu", "rms_norm_eps": 1e-6}
_FOREIGN: Final = tuple(
    Family(
        name, model_type, special, settings=settings, together=_ALONE, truth=Truth.QUERIES,
        differs="transformers hasn't got it", unserved=unserved,
    )
    for name, model_type, special, settings, unserved in (
        ("InternLM2", "internlm2", "q, k and v in one", {**_SILU, "bias": False}, ""),
        ("InternLM3", "internlm3", "", {**_SILU, "qkv_bias": False}, ""),
        (
            "MiniCPM", "minicpm", "scaled residuals",
            {
                **_SILU, "scale_depth": 1.4, "scale_emb": 12, "dim_model_base": 64,
                "num_experts": 0,
            },
            "",
        ),
        ("Orion", "orion", "LayerNorm", _SILU, ""),
        ("EXAONE", "exaone", "", {"activation_function": "silu", "layer_norm_epsilon": 1e-6}, ""),
        ("Baichuan", "baichuan", "", {"hidden_act": "silu"}, "was supported in vLLM until v0.23.0"),
    )
)  # fmt: skip

_MIXTURES: Final = (
    Family("Mixtral", "mixtral", "experts", settings=_EXPERTS, short=True),
    Family(
        "Qwen2-MoE", "qwen2_moe", "experts, one of them shared",
        settings={**_NAMED_EXPERTS, "shared_expert_intermediate_size": 32},
    ),
    Family("Qwen3-MoE", "qwen3_moe", "experts", settings={**_NAMED_EXPERTS, "head_dim": 32}),
    Family("GraniteMoE", "granitemoe", "experts", settings={**_EXPERTS, "attention_multiplier": 0.1}),
    Family("OLMoE", "olmoe", "experts", settings={"num_experts": 4, "num_experts_per_tok": 2}),
    Family("dots1", "dots1", "experts", settings={**_ROUTED_EXPERTS, "head_dim": 32}),
    Family("PhiMoE", "phimoe", "experts", settings=_EXPERTS, unserved="too many values to unpack"),
    Family(
        "Ernie 4.5-MoE", "ernie4_5_moe", "experts",
        settings={
            "head_dim": 32, "moe_intermediate_size": 32, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1, "moe_layer_end_index": 1,
        },
        together=_ALONE, truth=Truth.QUERIES, differs="transformers' experts give other numbers",
    ),
    Family("GLM-4-MoE", "glm4_moe", "experts", settings={**_ROUTED_EXPERTS, "head_dim": 32}),
)  # fmt: skip

_SPECIAL: Final = (
    Family(
        "Mistral", "mistral", "a window in every layer", (Part(Kind.WINDOW, (0, 1)),),
        settings={"sliding_window": 32, "head_dim": 32},
    ),
    Family(
        "Ministral", "ministral", "a window in every layer", (Part(Kind.WINDOW, (0, 1)),),
        settings={"sliding_window": 32, "head_dim": 32},
    ),
    Family(
        "StarCoder2", "starcoder2", "a window in every layer", (Part(Kind.WINDOW, (0, 1)),),
        settings={"sliding_window": 32},
    ),
    Family(
        "Cohere 2", "cohere2", "windows, attention beside the MLP", _MOST_WINDOWS,
        settings={**_WINDOWS, "head_dim": 32}, together=_ALONE, truth=Truth.QUERIES,
        differs="transformers' window is one key shorter",
    ),
    Family("OLMo 3", "olmo3", "windows, norms after attention", _MOST_WINDOWS, settings=_WINDOWS),
    Family(
        "EXAONE 4", "exaone4", "windows, norms after attention", _HALF_WINDOWS,
        settings={**_WINDOWS, "sliding_window_pattern": 2},
    ),
    Family(
        "Gemma 2", "gemma2", "soft cap, windows", (Part(Kind.SOFT_CAP, (0, 1, 2, 3)),),
        settings={**_WINDOWS, "head_dim": 32, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 5.0}, short=True,
    ),
    Family(
        "Gemma 3", "gemma3_text", "windows, two rotary bases", _MOST_WINDOWS,
        settings={
            **_WINDOWS, "head_dim": 32, "query_pre_attn_scalar": 32,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        },
        short=True,
    ),
    Family(
        "gpt-oss", "gpt_oss", "learned sinks, windows, experts", (Part(Kind.SINK, (0, 1)),),
        settings={**_EXPERTS, "head_dim": 32, "sliding_window": 32}, short=True,
    ),
    Family(
        "Bloom", "bloom", "ALiBi", (Part(Kind.ALIBI, (0, 1)),), settings={"n_layer": 2, "n_head": 4},
        together=_ALONE, truth=Truth.QUERIES, differs="transformers approximates GELU by tanh", short=True,
    ),
    Family(
        "Falcon", "falcon", "one KV head", (Part(Kind.MULTI_QUERY, (0, 1)),),
        settings={"multi_query": True, "new_decoder_architecture": False}, short=True,
    ),
    Family(
        "Falcon with KV groups", "falcon", "two KV heads",
        settings={"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    Family(
        "Falcon with ALiBi", "falcon", "ALiBi", (Part(Kind.ALIBI, (0, 1)),),
        settings={"multi_query": False, "new_decoder_architecture": False, "alibi": True},
        together=_ALONE, truth=Truth.QUERIES, differs="transformers divides the bias by the root of the head size",
    ),
    Family(
        "GPTBigCode", "gpt_bigcode", "one KV head, learned positions", (Part(Kind.MULTI_QUERY, (0, 1)),),
        settings={"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512, "multi_query": True},
        without=["num_key_value_heads"],
    ),
    Family(
        "Gemma 3n", "gemma3n_text", "keys of earlier layers, windows, four streams",
        (Part(Kind.WINDOW, (0,)), Part(Kind.CAUSAL, (1,)), Part(Kind.SHARED, (2, 3))),
        settings={
            **_WINDOWS, "head_dim": 32, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 512, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4,
            "intermediate_size": [128] * 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    Family(
        "Gemma 4", "gemma4_text", "two head sizes, keys of earlier layers",
        (Part(Kind.WINDOW, (0,)), Part(Kind.CAUSAL, (1,)), Part(Kind.SHARED, (2, 3))),
        settings={
            **_WINDOWS, "head_dim": 32, "global_head_dim": 64, "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 512,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        short=True,
    ),
    Family(
        "MiMo-V2", "mimo_v2_flash", "K of 64 and V of 32 numbers, windows",
        (Part(Kind.TWO_SIZES, (0, 1, 2, 3)),),
        settings={
            **_WINDOWS, "head_dim": 64, "v_head_dim": 32, "layer_types": ["sliding_attention", "full_attention"] * 2,
            "mlp_layer_types": ["dense"] * 4, "hybrid_layer_pattern": [1, 0, 1, 0], "moe_layer_freq": [0] * 4,
            "swa_head_dim": 64, "swa_v_head_dim": 32, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
            "sliding_window_size": 32, "layernorm_epsilon": 1e-5,
        },
        unserved="next_power_of_2",
    ),
    Family(
        "Laguna", "laguna", "layers of 4 and of 8 query heads, gates, windows", _HALF_WINDOWS,
        settings={
            **_WINDOWS, "head_dim": 32, "num_attention_heads_per_layer": [4, 8, 4, 8], "mlp_layer_types": ["dense"] * 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    Family(
        "Llama 4", "llama4_text", "chunks of 64 tokens, experts",
        (Part(Kind.CHUNKED, (0, 1, 2)), Part(Kind.CAUSAL, (3,))),
        settings={
            "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 128, "head_dim": 32,
            "num_hidden_layers": 4, "attention_chunk_size": 64, "no_rope_layers": [1, 1, 1, 0],
        },
        serving={"block_size": 32}, short=True,
    ),
    Family(
        "MiniCPM3", "minicpm3", "K of 32 and V of 16 numbers, rotated in part", (Part(Kind.TWO_SIZES, (0, 1)),),
        settings={
            "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16, "v_head_dim": 16,
        },
    ),
    Family(
        "DeepSeek-V2", "deepseek_v2", "MLA, experts", (Part(Kind.LATENT, (0, 1)),),
        settings={**_ROUTED_EXPERTS, **_LATENT, "q_lora_rank": None}, short=True,
    ),
    Family(
        "DeepSeek-V3", "deepseek_v3", "MLA with compressed q", (Part(Kind.LATENT, (0, 1)),),
        settings={**_ROUTED_EXPERTS, **_LATENT, "q_lora_rank": 32, "first_k_dense_replace": 2},
    ),
    Family(
        "GLM-4-MoE-Lite", "glm4_moe_lite", "MLA, experts", (Part(Kind.LATENT, (0, 1)),),
        settings={**_ROUTED_EXPERTS, **_LATENT, "q_lora_rank": 32},
    ),
)  # fmt: skip

_SCAN: Final = "transformers' scan of Mamba2 rounds otherwise, 2e-3 in the statistics"
_SHORT_CONVOLUTION: Final = "transformers has other q and k at a prompt's second and third token"
_DELTA: Final = {
    "num_hidden_layers": 4, "head_dim": 128, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128,
}  # fmt: skip

_HYBRIDS: Final = (
    Family(
        "Granite hybrid", "granitemoehybrid", "Mamba2, experts", (Part(Kind.HYBRID, (1, 3)),),
        settings={
            **_EXPERTS, **_MAMBA, "num_hidden_layers": 4, "layer_types": ["mamba", "attention"] * 2,
            "shared_intermediate_size": 64, "mamba_d_head": 32, "attention_multiplier": 0.1,
        },
        together=_ALONE, short=True,
    ),
    Family(
        "Falcon-H1", "falcon_h1", "Mamba2 beside attention", (Part(Kind.HYBRID, (0, 1)),),
        settings={**_MAMBA, "mamba_d_ssm": 128, "mamba_d_head": 16, "head_dim": 32},
        together=_ALONE,
    ),
    Family(
        "Nemotron-H", "nemotron_h", "Mamba2, MLPs and attention in layers of their own", (Part(Kind.HYBRID, (1, 3)),),
        settings={
            "num_hidden_layers": 4, "hybrid_override_pattern": "M*-*", "mamba_num_heads": 8, "mamba_head_dim": 16,
            "ssm_state_size": 16, "n_groups": 1, "head_dim": 32,
        },
        together=_ALONE, truth=Truth.QUERIES, differs=_SCAN,
    ),
    Family(
        "Zamba2", "zamba2", "Mamba2, one attention block used in two layers", (Part(Kind.HYBRID, (2, 5)),),
        settings={
            "num_hidden_layers": 6, "num_key_value_heads": 4, "mamba_d_state": 16, "mamba_headdim": 16,
            "n_mamba_heads": 16, "mamba_ngroups": 1, "num_mem_blocks": 1, "use_shared_attention_adapter": False,
            "layers_block_type": ["mamba", "mamba", "hybrid"] * 2,
        },
        together=_ALONE, truth=Truth.QUERIES, differs=_SCAN,
    ),
    Family(
        "LFM2", "lfm2", "short convolutions", (Part(Kind.HYBRID, (1, 3)),),
        settings={
            "num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2, "conv_dim": 128, "block_dim": 128,
            "block_ff_dim": 128,
        },
        together=_ALONE, truth=Truth.QUERIES, differs=_SHORT_CONVOLUTION,
    ),
    Family(
        "LFM2-MoE", "lfm2_moe", "short convolutions, experts", (Part(Kind.HYBRID, (1, 3)),),
        settings={
            **_NAMED_EXPERTS, "num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2, "conv_dim": 128,
            "block_dim": 128, "num_dense_layers": 1,
        },
        together=_ALONE, truth=Truth.QUERIES, differs=_SHORT_CONVOLUTION,
    ),
    Family(
        "Qwen3-Next", "qwen3_next", "gated delta rule, experts", (Part(Kind.HYBRID, (3,)),),
        settings={**_NAMED_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 32}, serving={"dtype": "bfloat16"},
        together=_ALONE, truth=Truth.QUERIES, differs="vLLM's delta rule for CPUs has bfloat16 alone",
    ),
    Family(
        "Qwen3.5", "qwen3_5_text", "gated delta rule", (Part(Kind.HYBRID, (3,)),), settings=_DELTA,
        serving={"dtype": "bfloat16"}, unserved="failed to be inspected",
    ),
    Family(
        "Jamba", "jamba", "Mamba, experts", (Part(Kind.HYBRID, (1, 3)),),
        settings={
            **_EXPERTS, "num_experts": 4, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
            "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 16, "use_mamba_kernels": False,
        },
        together=_ALONE, unserved="selective_scan_fwd",
    ),
    Family(
        "Bamba", "bamba", "Mamba2", (Part(Kind.HYBRID, (1, 3)),),
        settings={**_MAMBA, "num_hidden_layers": 4, "attn_layer_indices": [1, 3], "mamba_d_head": 32},
        together=_ALONE, unserved="does not dispatch through the Transformers attention interface",
    ),
    Family(
        "MiniMax", "minimax", "lightning attention, experts", (Part(Kind.HYBRID, (1, 3)),),
        settings={**_EXPERTS, "head_dim": 32, "num_hidden_layers": 4}, together=_ALONE,
        unserved="does not dispatch through the Transformers attention interface",
    ),
    Family(
        "OLMo hybrid", "olmo_hybrid", "gated delta rule", (Part(Kind.HYBRID, (3,)),),
        settings={"num_hidden_layers": 4, "pad_token_id": 0}, together=_ALONE, unserved="set_allocator",
    ),
)  # fmt: skip

_POOLING: Final = {
    "runner": "pooling", "pooler_config": {"task": "token_embed"}, "skip_tokenizer_init": False,
    "max_num_batched_tokens": 512,
}  # fmt: skip
# Sizes that have other names in models with an encoder and a decoder.
_DECODERS_ALONE: Final = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings",
)  # fmt: skip
_ENCODED: Final = (Part(Kind.ENCODER, (0, 1), ENCODER),)
_ENCODERS: Final = (
    Family(
        "Qwen3 for embedding", "qwen3", "vectors", settings={"head_dim": 32}, task=Task.EMBED,
        serving=_POOLING,
    ),
    # Its encoder is none of vLLM's attention layers: it has no cache.
    Family(
        "Whisper", "whisper", "decoder of audio",
        (Part(Kind.CAUSAL, (0, 1, 2)), Part(Kind.CROSS, (0, 1, 2), CROSS)),
        settings={
            "d_model": 128, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_source_positions": 100,
            "max_target_positions": 256, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
            "decoder_start_token_id": 1,
        },
        without=_DECODERS_ALONE,
        task=Task.TRANSCRIBE, serving={"skip_tokenizer_init": False, "max_num_batched_tokens": 512},
    ),
    Family(
        "BART", "bart", "decoder of text", (Part(Kind.CAUSAL, (0, 1)), Part(Kind.CROSS, (0, 1), CROSS)),
        settings={"d_model": 128, "encoder_layers": 2, "decoder_layers": 2}, without=_DECODERS_ALONE,
        task=Task.TRANSLATE, serving={"max_num_batched_tokens": 512}, unserved="position_ids not found",
    ),
    Family(
        "T5", "t5", "decoder of text, biases by distance",
        (Part(Kind.CAUSAL, (0, 1)), Part(Kind.CROSS, (0, 1), CROSS)), settings={"d_model": 128, "num_layers": 2},
        without=_DECODERS_ALONE, task=Task.TRANSLATE, serving={"max_num_batched_tokens": 512},
        unserved="position_ids not found",
    ),
    Family(
        "BERT", "bert", "sees what follows, vectors", _ENCODED, without=["num_key_value_heads"], task=Task.EMBED,
        serving=_POOLING, short=True,
    ),
    Family(
        "RoBERTa", "roberta", "sees what follows, vectors", _ENCODED, without=["num_key_value_heads"], task=Task.EMBED,
        serving=_POOLING,
    ),
    Family(
        "ModernBERT", "modernbert", "sees what follows, windows, vectors",
        (Part(Kind.ENCODER, (0, 1, 2, 3), ENCODER),),
        settings={"num_hidden_layers": 4, "local_attention": 32, "pad_token_id": 0},
        without=["num_key_value_heads"], task=Task.EMBED, serving=_POOLING,
    ),
)  # fmt: skip

FAMILIES: Final = (*_DENSE, *_FOREIGN, *_MIXTURES, *_SPECIAL, *_HYBRIDS, *_ENCODERS)
