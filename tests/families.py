"""Tiny models of peculiar families: with parts that see, decoders with surroundings, windows in the mask alone."""

import torch
from models import SHAPE, VOCABULARY
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def gemma3_that_sees() -> PreTrainedConfig:
    seeing = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    seeing |= {"image_size": 28, "patch_size": 14}
    text = {**SHAPE, "head_dim": 8, "pad_token_id": 0, "sliding_window": 8}
    return AutoConfig.for_model("gemma3", text_config=text, vision_config=seeing)


def opt() -> PreTrainedConfig:
    return AutoConfig.for_model("opt", **SHAPE, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0)


def llama4() -> PreTrainedConfig:
    more = {"intermediate_size_mlp": 64, "head_dim": 8, "num_local_experts": 2, "attention_chunk_size": 16}
    return AutoConfig.for_model("llama4_text", **{**SHAPE, **more})


CONFIGS = {"gemma3 that sees": gemma3_that_sees, "opt": opt, "llama4": llama4}


def model_of(config: PreTrainedConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


EXPERTS = {"num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_shared_experts": 1}
EXPERTS |= {"head_dim": 8, "first_k_dense_replace": 1, "moe_num_experts": 8, "moe_k": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
LATENT |= {"num_key_value_heads": 4, "n_group": 2, "topk_group": 1}
EXPERT_FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss")


def of_experts(family: str, **more: object) -> PreTrainedConfig:
    latent = LATENT if "deepseek" in family else {}
    return AutoConfig.for_model(family, **{**SHAPE, **EXPERTS, **latent, **more})


def dense_before_experts(layers: int) -> PreTrainedConfig:
    return of_experts("deepseek_v3", num_hidden_layers=layers, first_k_dense_replace=3)


def qwen2_moe(window: int) -> PreTrainedConfig:
    experts = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 2}
    experts |= {"num_experts_per_tok": 2, "use_sliding_window": True, "max_window_layers": 4}
    return AutoConfig.for_model("qwen2_moe", **SHAPE, **experts, sliding_window=window)


def llama4_of_chunks(chunk: int) -> PreTrainedConfig:
    config = llama4()
    config.attention_chunk_size = chunk
    return config


def model_whose_rounding_grows() -> PreTrainedModel:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 40}
    return model_of(AutoConfig.for_model("llama", vocab_size=VOCABULARY, initializer_range=0.5, **shape)).bfloat16()


def are_logits_close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() < 5e-2 * theirs.abs().max())
