"""Tensor names of the two formats, as far as families share them, and what both formats let one see from the names alone."""

from headrace.workers.loader import Checkpoint
from headrace.workers.model.config import WeightNames

HUGGINGFACE = WeightNames(
    embedding="model.embed_tokens.weight",
    final_norm="model.norm.weight",
    head="lm_head.weight",
    q="model.layers.{}.self_attn.q_proj.weight",
    k="model.layers.{}.self_attn.k_proj.weight",
    v="model.layers.{}.self_attn.v_proj.weight",
    o="model.layers.{}.self_attn.o_proj.weight",
    gate="model.layers.{}.mlp.gate_proj.weight",
    up="model.layers.{}.mlp.up_proj.weight",
    down="model.layers.{}.mlp.down_proj.weight",
    attention_norm="model.layers.{}.input_layernorm.weight",
    mlp_norm="model.layers.{}.post_attention_layernorm.weight",
    q_norm="model.layers.{}.self_attn.q_norm.weight",
    k_norm="model.layers.{}.self_attn.k_norm.weight",
)

GGUF = WeightNames(
    embedding="token_embd.weight",
    final_norm="output_norm.weight",
    head="output.weight",
    q="blk.{}.attn_q.weight",
    k="blk.{}.attn_k.weight",
    v="blk.{}.attn_v.weight",
    o="blk.{}.attn_output.weight",
    gate="blk.{}.ffn_gate.weight",
    up="blk.{}.ffn_up.weight",
    down="blk.{}.ffn_down.weight",
    attention_norm="blk.{}.attn_norm.weight",
    mlp_norm="blk.{}.ffn_norm.weight",
    q_norm="blk.{}.attn_q_norm.weight",
    k_norm="blk.{}.attn_k_norm.weight",
    router="blk.{}.ffn_gate_inp.weight",
    expert_gate_up=("blk.{}.ffn_gate_exps.weight", "blk.{}.ffn_up_exps.weight"),
    expert_down="blk.{}.ffn_down_exps.weight",
)


def bias_of(name: str) -> str:
    """The name of the bias beside a weight."""
    return name.removesuffix("weight") + "bias"


def has_bias(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the weight `name` has a bias in layer 0, and so in all."""
    return bias_of(name.format(0)) in checkpoint
