"""Tiny random configurations of families: what they differ in is switched on.

`COMMON` and its extensions are shared with tests/conftest.py; `MORE` are the families that only
the matrix runs (tests/support/matrix.py).
"""

COMMON: dict[str, object] = {
    "vocab_size": 290,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    # With 0.02 experts do not matter, and every test would pass.
    "initializer_range": 0.25,
}
SMALL = {**COMMON, "intermediate_size": 16, "num_experts_per_tok": 2}
EIGHT = {**SMALL, "num_experts": 8}
SHARED_EXPERT = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
LATENT = {  # multi-head latent attention
    **SMALL,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 0,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
_HEADS = {"head_dim": 8}
_SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
_DENSE_FIRST = {"num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"]}
_FULL = {"layer_types": ["full_attention", "full_attention"]}
# Attention reads the likeliest tokens of an index; all of them while a prompt is short.
_INDEX = {"index_topk": 4096, "index_head_dim": 16, "index_n_heads": 2}
# Linear attention in the first layer.
_LINEAR_FIRST = {"layer_types": ["linear_attention", "full_attention"]}
_GROUPS = {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5}
_GRANITE = {
    **SMALL,
    "num_local_experts": 8,
    "shared_intermediate_size": 24,
    "residual_multiplier": 0.5,
}

# By config.model_type.
MORE: dict[str, dict[str, object]] = {
    "afmoe": {
        **EIGHT,
        **_HEADS,
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
        "num_shared_experts": 1,
        "moe_intermediate_size": 16,
        "route_scale": 1.5,
        "mup_enabled": True,
        "layer_types": ["full_attention"] * 3,
    },
    "aria_text": {
        **COMMON,
        "intermediate_size": 16,
        "moe_num_experts": 8,
        "moe_topk": 2,
        "moe_num_shared_experts": 1,
    },
    "axk1": {**LATENT, **_SPARSE},
    "axk2": {**LATENT, **_SPARSE, **_INDEX, "n_group": None, "topk_group": None},
    "bailing_hybrid": {
        **{k: v for k, v in LATENT.items() if k != "n_routed_experts"},
        **_SPARSE,
        **_LINEAR_FIRST,
        "num_local_experts": 8,
        "num_mtp_layers": 0,
    },
    "beam": {
        **EIGHT,
        **_HEADS,
        **_SPARSE,
        **_FULL,
        **_GROUPS,
        "moe_intermediate_size": 16,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "cohere2_moe": {
        **EIGHT,
        **_HEADS,
        **_DENSE_FIRST,
        "layer_types": ["full_attention"] * 3,
        "num_shared_experts": 1,
        "expert_selection_fn": "sigmoid",
        "logit_scale": 1.0,
        "prefix_dense_intermediate_size": 16,
    },
    "deepseek_v32": {**LATENT, **_INDEX},
    "deepseek_v4": {
        **COMMON,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_experts_per_tok": 2,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 16,
        "q_lora_rank": 16,
        "o_groups": 2,
        "o_lora_rank": 8,
        "partial_rotary_factor": 0.5,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 3,
        **_INDEX,
        "sliding_window": 4096,
        "num_nextn_predict_layers": 0,
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "layer_types": [
            "heavily_compressed_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
        ],
    },
    "dots1": {
        **SMALL,
        **_HEADS,
        **_GROUPS,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
    },
    "exaone_moe": {
        **EIGHT,
        **_HEADS,
        **_SPARSE,
        **_FULL,
        **_GROUPS,
        "moe_intermediate_size": 16,
        "num_shared_experts": 1,
    },
    "gemma4_text": {
        **COMMON,
        **_HEADS,
        **_FULL,
        "global_head_dim": 8,
        "intermediate_size": 16,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
        "vocab_size_per_layer_input": 290,
        "hidden_size_per_layer_input": 0,
    },
    "glm4_moe_lite": {
        **LATENT,
        **_SPARSE,
        "routed_scaling_factor": 1.8,
    },
    "glm_moe_dsa": {**LATENT, **_INDEX, "indexer_types": ["full", "shared"]},
    "granitemoe_swa": {**_GRANITE, **_FULL},
    "granitemoehybrid": {
        **_GRANITE,
        **_LINEAR_FIRST,
        "mamba_n_heads": 4,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    },
    "granitemoeshared": _GRANITE,
    "hunyuan_v1_moe": {
        **COMMON,
        **_HEADS,
        "intermediate_size": 16,
        "num_experts": 8,
        "moe_topk": 2,
    },
    "hy_v3": {
        **EIGHT,
        **_HEADS,
        **_DENSE_FIRST,
        "moe_intermediate_size": 16,
        "router_scaling_factor": 1.5,
    },
    "hy_v4": {
        **LATENT,
        **_INDEX,
        **_SPARSE,
        "num_key_value_heads": 4,
        "hc_mult": 2,
        "indexer_types": ["full", "shared"],
    },
    "kimi_linear": {
        **{k: v for k, v in LATENT.items() if k not in ("n_routed_experts", "head_dim")},
        **_SPARSE,
        **_LINEAR_FIRST,
        "q_lora_rank": None,
        "num_local_experts": 8,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "kolibri1": {**EIGHT, **_HEADS, **_FULL, **SHARED_EXPERT},
    "laguna": {
        **EIGHT,
        **_HEADS,
        **_DENSE_FIRST,
        **SHARED_EXPERT,
        "moe_routed_scaling_factor": 1.5,
        "moe_router_logit_softcapping": 2.0,
    },
    "mellum": {**EIGHT, **_HEADS, "moe_intermediate_size": 16},
    "mimo_v2_flash": {
        **SMALL,
        **_HEADS,
        **_SPARSE,
        **_FULL,
        **_GROUPS,
        "n_routed_experts": 8,
        "moe_intermediate_size": 16,
        "v_head_dim": 8,
    },
    "minimax": {**SMALL, **_HEADS, **_LINEAR_FIRST, "num_local_experts": 8, "mlp_beta_factor": 0.5},
    "minimax_m3_vl_text": {
        **SMALL,
        **_HEADS,
        **_SPARSE,
        **_FULL,
        "num_local_experts": 8,
        "dense_intermediate_size": 16,
        "shared_intermediate_size": 24,
        "rotary_dim": 4,
    },
    "nemotron_h": {
        **SMALL,
        **_HEADS,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "use_mamba_kernels": False,
        "ssm_state_size": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 16,
        "n_routed_experts": 8,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 24,
        "moe_latent_size": 24,
        "routed_scaling_factor": 1.5,
        "n_group": 2,
        "topk_group": 1,
    },
    "qwen3_5_moe_text": {
        **EIGHT,
        **SHARED_EXPERT,
        **_LINEAR_FIRST,
        "head_dim": 16,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "solar_open": {
        **SMALL,
        **_HEADS,
        **_GROUPS,
        "n_routed_experts": 8,
        "moe_intermediate_size": 16,
    },
}

# Vision-language checkpoints: the text model is that of another family, and reads no images here.
_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4}
_IMAGE_IDS = {
    name: 280 + i
    for i, name in enumerate(
        ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    )
}
_THREE_AXES = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 1.0,
    }
}
MORE |= {
    "qwen3_vl_moe": {
        **_IMAGE_IDS,
        "text_config": {
            **EIGHT,
            **_HEADS,
            **_THREE_AXES,
            "moe_intermediate_size": 16,
            "norm_topk_prob": True,
        },
        "vision_config": {
            **_VISION,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    },
    "glm4v_moe": {
        **_IMAGE_IDS,
        "text_config": {
            **SMALL,
            **_HEADS,
            **_GROUPS,
            **_THREE_AXES,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 0,
        },
        "vision_config": {**_VISION, "out_hidden_size": 32, "image_size": 8},
    },
    "mistral4": {
        **LATENT,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 4096,
        },
    },
    "aria": {
        "text_config": {**MORE["aria_text"], "model_type": "aria_text"},
        "vision_config": {
            "model_type": "idefics3_vision",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
        },
        "projector_patch_to_query_dict": {4: 4},
        "image_token_id": 280,
    },
    "qwen3_5_moe": {
        **_IMAGE_IDS,
        "text_config": MORE["qwen3_5_moe_text"],
        "vision_config": {**_VISION, "out_hidden_size": 32, "num_position_embeddings": 16},
    },
    "gemma4": {"text_config": MORE["gemma4_text"], "vision_config": None, "audio_config": None},
}
MORE |= {
    "flint": {**EIGHT, **_HEADS, **_FULL, **SHARED_EXPERT, "mlp_only_layers": []},
    "dots3_note_text": {
        **LATENT,
        **_GROUPS,
        "num_hidden_layers": 3,
        "head_dim": 16,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "layer_types": ["full_attention"] * 3,
        "use_dsa": False,
        "shared_experts_intermediate_size": 24,
    },
    "qwen4_exp_text": {
        **EIGHT,
        **SHARED_EXPERT,
        "head_dim": 16,
        "layer_types": ["linear_attention", "indexed_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "hc_count": 2,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4096,
        "indexer_compress_ratio": 4,
    },
    "inkling2_text": {
        **COMMON,
        **_HEADS,
        "unpadded_vocab_size": 290,
        "num_experts_per_tok": 2,
        "n_routed_experts": 8,
        "moe_intermediate_size": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "d_rel": 4,
        "rel_extent": 16,
        "sliding_window_size": 4096,
        "n_layers_per_attn_res_block": 1,
        "layer_types": ["hybrid_sliding", "hybrid"],
    },
}
_SQUARE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
_IMAGE = {**_SQUARE, "num_attention_heads": 2, "patch_size": 4}
_GRID = {**_IMAGE, "pos_emb_height": 4, "pos_emb_width": 4}
_SAM = {
    **_IMAGE,
    "image_size": 16,
    "output_channels": 16,
    "mlp_dim": 16,
    "window_size": 2,
    "global_attn_indexes": [0],
    "downsample_channels": [16, 16],
}
_AUDIO = {
    "num_mel_bins": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "d_model": 16,
    "output_dim": 32,
    "n_window": 4,
    "downsample_hidden_size": 8,
}
_READS = {k: v for k, v in LATENT.items() if k not in ("kv_lora_rank", "q_lora_rank")}
_THINKER = {
    **_IMAGE_IDS,
    "audio_token_id": 284,
    "text_config": {**EIGHT, **_HEADS, **_THREE_AXES, "moe_intermediate_size": 16},
    "vision_config": {
        **_VISION,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    },
    "audio_config": _AUDIO,
}
MORE |= {
    "mistral3": {
        "text_config": {**MORE["mistral4"], "model_type": "mistral4"},
        "vision_config": {**_IMAGE, "model_type": "pixtral", "image_size": 16},
        "image_token_index": 280,
    },
    "kimi_k25": {
        **_IMAGE_IDS,
        "text_config": {**LATENT, "model_type": "deepseek_v3"},
        "vision_config": _GRID,
        "projection_hidden_size": 16,
        "tie_word_embeddings": False,
    },
    "glm5_next": {
        "image_token_id": 280,
        "text_config": {
            **LATENT,
            **_SPARSE,
            **_INDEX,
            "qk_rope_head_dim": 0,
            "layer_types": ["linear_attention", "indexed_attention"],
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "hc_mult": 2,
            "hc_sinkhorn_iters": 3,
            "indexer_types": ["full", "full"],
        },
        "vision_config": {
            **_VISION,
            "out_hidden_size": 32,
            "image_size": 8,
            "projection_intermediate_size": 16,
        },
    },
    "minimax_m3_vl": {
        "text_config": MORE["minimax_m3_vl_text"],
        "vision_config": {**_IMAGE, "image_size": 8},
        "projector_hidden_size": 16,
        "image_token_index": 280,
        "video_token_index": 281,
    },
    "mistral_large4": {
        "text_config": {
            **{k: v for k, v in LATENT.items() if k != "q_lora_rank"},
            **_SPARSE,
            **_INDEX,
            "indexer_types": ["full", "shared"],
            "no_rope_layers": [1, 0],
        },
        "vision_config": {**_IMAGE, "model_type": "pixtral", "image_size": 16},
        "image_token_index": 280,
    },
    "step3p7": {
        "text_config": {
            **SMALL,
            **_HEADS,
            **_SPARSE,
            **_FULL,
            "n_routed_experts": 8,
            "moe_intermediate_size": 16,
            "share_expert_dim": 24,
            "sliding_window": 4096,
            "moe_router_scaling_factor": 1.5,
        },
        "vision_config": {**_IMAGE, "image_size": 16, "mlp_ratio": 1.0},
        "image_token_id": 280,
    },
    "muse_spark": {
        "text_config": {
            **SMALL,
            **_HEADS,
            **_SPARSE,
            **_FULL,
            "num_local_experts": 8,
            "moe_intermediate_size": 16,
            "moe_hidden_size": 24,
            "output_multiplier": 0.5,
        },
        "vision_config": _GRID,
        "audio_config": {
            "patch_sizes": [4, 4],
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "num_hidden_layers": 2,
            "out_hidden_size": 32,
        },
        "out_hidden_size": 64,
        "projector_hidden_size": 16,
        "image_token_id": 280,
        "video_token_id": 281,
        "audio_token_id": 282,
    },
    "inkling2": {
        "text_config": MORE["inkling2_text"],
        "vision_config": {
            **_IMAGE,
            "posemb_grid_size": 4,
            "projection_hidden_dim": 16,
            "text_hidden_size": 32,
        },
        "image_token_id": 280,
    },
    "qwen4_exp": {
        **_IMAGE_IDS,
        "text_config": MORE["qwen4_exp_text"],
        "vision_config": {**_VISION, "out_hidden_size": 32, "num_position_embeddings": 16},
    },
    "dots3_note": {
        "text_config": MORE["dots3_note_text"],
        "vision_config": {
            **_IMAGE,
            "num_hidden_layers": 2,
            "adapter_in_dim": 16,
            "adapter_out_dim": 32,
            "moe_intermediate_size": 16,
            "pyramid_num_routed": [-1, 8],
        },
        "audio_config": {
            **_SQUARE,
            "num_attention_heads": 2,
            "feature_size": 16,
            "downsample_hidden_size": 8,
            "adapter_input_size": 16,
            "adapter_out_dim": 32,
        },
        "image_token_id": 280,
        "video_token_id": 281,
        "audio_token_id": 282,
    },
    "nemotron_h_omni": {
        "text_config": {**MORE["nemotron_h"], "model_type": "nemotron_h"},
        "vision_config": {
            **_IMAGE,
            "model_type": "radio",
            "image_size": 16,
            "max_img_size": 16,
            "video_temporal_patch_size": 2,
        },
        "audio_config": None,
        "vision_hidden_size": 16,
        "projector_hidden_size": 16,
        "image_token_id": 280,
        "video_token_id": 281,
    },
    "deepseek_ocr2": {
        "text_config": {**_READS, **_SPARSE, "n_group": None, "topk_group": None},
        "vision_config": {
            "sam_config": _SAM,
            "encoder_config": {**_SQUARE, "num_attention_heads": 2, "num_key_value_heads": 2},
        },
        "image_token_id": 280,
    },
    "unlimited_ocr": {
        "text_config": {**_READS, **_SPARSE, "n_group": 1, "topk_group": 1, "sliding_window": 4096},
        "vision_config": {"sam_config": _SAM, "encoder_config": {**_IMAGE, "image_size": 16}},
        "image_token_id": 280,
    },
    "qwen3_omni_moe_thinker": _THINKER,
    "qwen3_omni_moe": {
        "thinker_config": _THINKER,
        "talker_config": {
            "text_config": {**EIGHT, **_HEADS, **_THREE_AXES, **SHARED_EXPERT},
            "code_predictor_config": {**SMALL, **_HEADS, "num_code_groups": 2},
            "num_code_groups": 2,
            "thinker_hidden_size": 32,
            "accept_hidden_layer": 1,
            "spatial_merge_size": 2,
        },
        "code2wav_config": {
            **SMALL,
            "codebook_size": 16,
            "num_quantizers": 2,
            "upsample_rates": [2],
            "upsampling_ratios": [2],
            "decoder_dim": 16,
        },
    },
}
