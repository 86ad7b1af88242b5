"""llama.cpp's names of text encoders -> Hugging Face's, which ComfyUI reads."""

from __future__ import annotations

import re
from pathlib import Path

from ...header import CheckpointError

T5 = {
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
}
"""enc.blk.N.X -> encoder.block.N.Y"""
LLAMA = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
"""blk.N.X -> model.layers.N.Y"""
WHOLE = {
    "t5": {"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm"},
    "llama": {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"},
}
FAMILIES = {"t5": "t5", "t5encoder": "t5", "qwen2": "llama", "qwen2vl": "llama", "qwen3": "llama"}
"""general.architecture -> which table. `llama` itself is missing: its files hold q and k with rows reordered."""
UMT5 = 256384
"""words of its vocabulary"""


def rename(architecture: object, names: list[str], path: Path) -> dict[str, str]:
    """tensor name -> key. Names of diffusion models are kept. Raises CheckpointError where two names would be one."""
    family = FAMILIES.get(architecture) if isinstance(architecture, str) else None
    if family is None or not any(re.match(r"(enc\.)?blk\.\d", n) for n in names):
        return {n: n for n in names}
    renamed = {n: _one(n, family) for n in names}
    if len(set(renamed.values())) < len(names):
        raise CheckpointError(f"{path}: damaged GGUF: two tensors of its {family} stand for one. Download it again.")
    return renamed


def _one(name: str, family: str) -> str:
    stem, _, last = name.rpartition(".")  # last: weight or bias
    block, table = ("enc.blk", T5) if family == "t5" else ("blk", LLAMA)
    if match := re.fullmatch(re.escape(block) + r"\.(\d+)\.(\w+)", stem):
        number, part = match.groups()
        if part in table:
            place = f"encoder.block.{number}." if family == "t5" else f"model.layers.{number}."
            return f"{place}{table[part]}.{last}"
    if stem in WHOLE[family]:
        return f"{WHOLE[family][stem]}.{last}"
    return name


def to_llama_cpp(key: str) -> str:
    """Hugging Face's name of a T5 encoder's weight -> llama.cpp's."""
    stem, _, last = key.rpartition(".")
    places = {hf: ggml for ggml, hf in WHOLE["t5"].items()} | {"encoder.embed_tokens": "token_embd"}
    if match := re.fullmatch(r"encoder\.block\.(\d+)\.(.+)", stem):
        number, part = match.groups()
        for ggml, hf in T5.items():
            if hf == part:
                return f"enc.blk.{number}.{ggml}.{last}"
    return f"{places[stem]}.{last}" if stem in places else key
