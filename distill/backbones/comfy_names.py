"""Transformers' weights: diffusers' names -> those of the models' own repositories, which are the ones ComfyUI loads.

A table gives each of diffusers' modules, or one weight of it, its other name; "#" stands for a block's number. Where
several become one, as queries, keys and values do, they are "name/0", "name/1", ...: their rows are stacked in this
order. Before "~name" the halves of the rows change places: diffusers' last modulation is (scale, shift), theirs (shift,
scale). What the names are is told by comfy/utils.py of ComfyUI and by the converters among diffusers' scripts.
"""

from __future__ import annotations

import re

import torch

from ..layouts import Weights

NUMBER = re.compile(r"(?<=transformer_blocks\.)\d+")


def rename(weights: Weights, table: dict[str, str]) -> Weights:
    """Every weight under its other name. Raises KeyError for one without a place in the table."""
    renamed: Weights = {}
    stacks: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in weights.items():
        module, _, last = key.rpartition(".")
        number, ways = NUMBER.search(key), [(key, ""), (module, last)]
        ways += [(NUMBER.sub("#", ours), rest) for ours, rest in ways]
        ours, last = next((way for way in ways if way[0] in table), ways[-1])
        target = table[ours]
        if target.startswith("~"):
            target, value = target[1:], torch.cat(value.chunk(2)[::-1])
        target, _, place = target.partition("/")
        name = f"{target}.{last}".strip(".").replace("#", number[0] if number else "")
        if place:
            stacks.setdefault(name, {})[place] = value
        else:
            renamed[name] = value
    return renamed | {name: torch.cat([rows[i] for i in sorted(rows)]) for name, rows in stacks.items()}


def linears(ours: str, theirs: str) -> dict[str, str]:
    """An embedder of two layers."""
    first, second = theirs.split(" ")
    return {f"{ours}.linear_1": first, f"{ours}.linear_2": second}


def sd3(blocks: int) -> dict[str, str]:
    """SD3Transformer2DModel with so many blocks -> MMDiT."""
    block, x, text = "transformer_blocks.#", "joint_blocks.#.x_block", "joint_blocks.#.context_block"
    table = {
        "pos_embed": "",
        "pos_embed.proj": "x_embedder.proj",
        "context_embedder": "context_embedder",
        "norm_out.linear": "~final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
        f"{block}.attn.to_add_out": f"{text}.attn.proj",
    }
    table |= linears("time_text_embed.timestep_embedder", "t_embedder.mlp.0 t_embedder.mlp.2")
    table |= linears("time_text_embed.text_embedder", "y_embedder.mlp.0 y_embedder.mlp.2")
    for attn in ("attn", "attn2"):
        table |= {f"{block}.{attn}.to_{q}": f"{x}.{attn}.qkv/{i}" for i, q in enumerate("qkv")}
        table |= {f"{block}.{attn}.norm_{q}": f"{x}.{attn}.ln_{q}" for q in "qk"}
        table[f"{block}.{attn}.to_out.0"] = f"{x}.{attn}.proj"
    table |= {f"{block}.attn.add_{q}_proj": f"{text}.attn.qkv/{i}" for i, q in enumerate("qkv")}
    table |= {f"{block}.attn.norm_added_{q}": f"{text}.attn.ln_{q}" for q in "qk"}
    for ours, theirs in (("", x), ("_context", text)):
        table[f"{block}.norm1{ours}.linear"] = f"{theirs}.adaLN_modulation.1"
        table |= {f"{block}.ff{ours}.net.0.proj": f"{theirs}.mlp.fc1", f"{block}.ff{ours}.net.2": f"{theirs}.mlp.fc2"}
    # of the last block's text only keys and values are used, and its modulation is as a last layer's
    table[f"transformer_blocks.{blocks - 1}.norm1_context.linear"] = f"~{text}.adaLN_modulation.1"
    return table


def flux() -> dict[str, str]:
    """FluxTransformer2DModel -> Flux."""
    block, double = "transformer_blocks.#", "double_blocks.#"
    alone, single = "single_transformer_blocks.#", "single_blocks.#"
    table = {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "norm_out.linear": "~final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
        f"{alone}.norm.linear": f"{single}.modulation.lin",
        f"{alone}.proj_mlp": f"{single}.linear1/3",
        f"{alone}.proj_out": f"{single}.linear2",
    }
    for ours, theirs in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance")):
        table |= linears(f"time_text_embed.{ours}_embedder", f"{theirs}_in.in_layer {theirs}_in.out_layer")
    table |= {f"{alone}.attn.to_{q}": f"{single}.linear1/{i}" for i, q in enumerate("qkv")}
    for q, name in (("q", "query_norm.scale"), ("k", "key_norm.scale")):
        table[f"{alone}.attn.norm_{q}.weight"] = f"{single}.norm.{name}"
        table[f"{block}.attn.norm_{q}.weight"] = f"{double}.img_attn.norm.{name}"
        table[f"{block}.attn.norm_added_{q}.weight"] = f"{double}.txt_attn.norm.{name}"
    table |= {f"{block}.attn.to_{q}": f"{double}.img_attn.qkv/{i}" for i, q in enumerate("qkv")}
    table |= {f"{block}.attn.add_{q}_proj": f"{double}.txt_attn.qkv/{i}" for i, q in enumerate("qkv")}
    for ours, theirs, out in (("", "img", "to_out.0"), ("_context", "txt", "to_add_out")):
        table[f"{block}.norm1{ours}.linear"] = f"{double}.{theirs}_mod.lin"
        table[f"{block}.attn.{out}"] = f"{double}.{theirs}_attn.proj"
        table |= {f"{block}.ff{ours}.net.{a}": f"{double}.{theirs}_mlp.{b}" for a, b in (("0.proj", 0), (2, 2))}
    return table


def pixart() -> dict[str, str]:
    """PixArtTransformer2DModel -> PixArtMS."""
    block, theirs = "transformer_blocks.#", "blocks.#"
    table = {
        "": "final_layer",
        "pos_embed.proj": "x_embedder.proj",
        "adaln_single.linear": "t_block.1",
        "proj_out": "final_layer.linear",
        block: theirs,
        f"{block}.attn2.to_q": f"{theirs}.cross_attn.q_linear",
        f"{block}.attn2.to_k": f"{theirs}.cross_attn.kv_linear/0",
        f"{block}.attn2.to_v": f"{theirs}.cross_attn.kv_linear/1",
        f"{block}.attn1.to_out.0": f"{theirs}.attn.proj",
        f"{block}.attn2.to_out.0": f"{theirs}.cross_attn.proj",
        f"{block}.ff.net.0.proj": f"{theirs}.mlp.fc1",
        f"{block}.ff.net.2": f"{theirs}.mlp.fc2",
    }
    for ours, name in (("timestep", "t"), ("resolution", "csize"), ("aspect_ratio", "ar")):
        table |= linears(f"adaln_single.emb.{ours}_embedder", f"{name}_embedder.mlp.0 {name}_embedder.mlp.2")
    table |= linears("caption_projection", "y_embedder.y_proj.fc1 y_embedder.y_proj.fc2")
    return table | {f"{block}.attn1.to_{q}": f"{theirs}.attn.qkv/{i}" for i, q in enumerate("qkv")}
