"""Names of weights: diffusers' and transformers' <-> those of Stable Diffusion's single files (LDM). Pure renaming.

One table per network gives each module its other name; a weight is renamed by the longest module prefix in the table.
The tables are built from the network's own configuration, so that any depth and width works.
"""

from __future__ import annotations

import torch

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
Weights = dict[str, torch.Tensor]

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _rename(weights: Weights, table: dict[str, str], what: str) -> Weights:
    """Rename each weight by the longest prefix of its name that the table knows. Raises KeyError where none does."""
    renamed = {}
    for key, value in weights.items():
        module, rest = key, ""
        while module not in table:
            module, dot, last = module.rpartition(".")
            if not dot:
                raise KeyError(f"{what} {key}")
            rest = f".{last}{rest}"
        renamed[table[module] + rest] = value
    return renamed


def _invert(table: dict[str, str]) -> dict[str, str]:
    return {ldm: ours for ours, ldm in table.items()}


def per_level(value: int | list | tuple, levels: int) -> list:
    """diffusers writes one number for all levels, or a list with one per level."""
    return list(value) if isinstance(value, list | tuple) else [value] * levels


def unet_table(config: dict) -> dict[str, str]:
    """UNet2DConditionModel's module names -> those of LDM's UNetModel.

    LDM numbers blocks through all levels (`input_blocks.n`), each a list of resnet, attention, resampler.
    """
    down, up = config["down_block_types"], config["up_block_types"]
    layers = per_level(config.get("layers_per_block", 2), len(down))
    table = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    for k, position in ((1, 0), (2, 2)):
        table[f"time_embedding.linear_{k}"] = f"time_embed.{position}"
        pooled = "class_embedding" if config.get("class_embed_type") else "add_embedding"
        table[f"{pooled}.linear_{k}"] = f"label_emb.0.{position}"

    def resnet(ours: str, ldm: str) -> None:
        table.update({f"{ours}.{a}": f"{ldm}.{b}" for a, b in RESNET.items()})

    n = 1
    for i, kind in enumerate(down):
        for j in range(layers[i]):
            resnet(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{n}.0")
            if "CrossAttn" in kind:
                table[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{n}.1"
            n += 1
        if i < len(down) - 1:
            table[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
            n += 1
    resnet("mid_block.resnets.0", "middle_block.0")
    table["mid_block.attentions.0"] = "middle_block.1"
    resnet("mid_block.resnets.1", "middle_block.2")
    n = 0
    for i, kind in enumerate(up):
        attention = "CrossAttn" in kind
        for j in range(layers[-1 - i] + 1):
            resnet(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{n}.0")
            if attention:
                table[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{n}.1"
            n += 1
        if i < len(up) - 1:
            table[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{n - 1}.{1 + attention}.conv"
    return table


def unet_to_ldm(weights: Weights, config: dict) -> Weights:
    """Diffusers' names of a U-Net's weights -> LDM's. Raises KeyError for one without a place."""
    return _rename(weights, unet_table(config), "U-Net")


def unet_to_diffusers(weights: Weights, config: dict) -> Weights:
    """LDM's names of a U-Net's weights -> diffusers'. Raises KeyError for one without a place."""
    return _rename(weights, _invert(unet_table(config)), "U-Net")


def vae_table(config: dict) -> dict[str, str]:
    """AutoencoderKL's module names -> those of LDM's. LDM numbers the decoder's levels from the image inwards."""
    levels = len(config["block_out_channels"])
    layers = config.get("layers_per_block", 1)
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        table |= {f"{side}.conv_in": f"{side}.conv_in", f"{side}.conv_out": f"{side}.conv_out"}
        table[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        for j in range(2):
            table[f"{side}.mid_block.resnets.{j}"] = f"{side}.mid.block_{j + 1}"
        for ours, ldm in VAE_ATTENTION.items():
            table[f"{side}.mid_block.attentions.0.{ours}"] = f"{side}.mid.attn_1.{ldm}"
    resnets = []
    for i in range(levels):
        down, up, level = f"encoder.down_blocks.{i}", f"decoder.up_blocks.{i}", levels - 1 - i
        resnets += [(f"{down}.resnets.{j}", f"encoder.down.{i}.block.{j}") for j in range(layers)]
        resnets += [(f"{up}.resnets.{j}", f"decoder.up.{level}.block.{j}") for j in range(layers + 1)]
        table[f"{down}.downsamplers.0.conv"] = f"encoder.down.{i}.downsample.conv"
        table[f"{up}.upsamplers.0.conv"] = f"decoder.up.{level}.upsample.conv"
    for ours, ldm in resnets:
        table |= {ours: ldm, f"{ours}.conv_shortcut": f"{ldm}.nin_shortcut"}
    return table


def is_patch(vae_config: dict) -> bool:
    """Whether a VAE's config is that of `autoencoder.PatchAutoencoder`, which has one set of names everywhere."""
    return vae_config.get("type") == "patch"


def vae_to_ldm(weights: Weights, config: dict) -> Weights:
    """LDM's attention projections are 1x1 convolutions: (out, in) -> (out, in, 1, 1)."""
    if is_patch(config):
        return weights
    renamed = _rename(weights, vae_table(config), "VAE")
    return {k: v[:, :, None, None] if ".attn_1." in k and v.ndim == 2 else v for k, v in renamed.items()}


def vae_to_diffusers(weights: Weights, config: dict) -> Weights:
    """The way back from `vae_to_ldm`."""
    if is_patch(config):
        return weights
    renamed = _rename(weights, _invert(vae_table(config)), "VAE")
    return {k: v[:, :, 0, 0] if ".attentions." in k and v.ndim == 4 else v for k, v in renamed.items()}


def text_to_ldm(weights: Weights, config: dict | None = None) -> Weights:
    """transformers 5 dropped CLIPTextModel's leading `text_model.`; single files have it."""
    return {"text_model." + k.removeprefix("text_model."): v for k, v in weights.items()}


def text_to_diffusers(weights: Weights, config: dict | None = None) -> Weights:
    """The way back from `text_to_ldm`."""
    return {k.removeprefix("text_model."): v for k, v in weights.items()}


OPENCLIP = {
    "embeddings.token_embedding": "token_embedding",
    "final_layer_norm": "ln_final",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def text_to_openclip(weights: Weights) -> Weights:
    """transformers' CLIP text model -> OpenCLIP's names, as Stable Diffusion 2.x and XL hold their larger one: queries,
    keys and values in one matrix, the projection (in, out) instead of (out, in)."""
    weights = {k.removeprefix("text_model."): v for k, v in weights.items() if not k.endswith("position_ids")}
    renamed = {}
    for key, value in weights.items():
        layer, _, rest = key.removeprefix("encoder.layers.").partition(".")
        module, _, kind = (rest if layer.isdigit() else key).rpartition(".")
        block = f"transformer.resblocks.{layer}." if layer.isdigit() else ""
        if module == "self_attn.q_proj":
            three = [weights[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            renamed[f"{block}attn.in_proj_{kind}"] = torch.cat(three)
        elif module == "embeddings.position_embedding":
            renamed["positional_embedding"] = value
        elif module == "text_projection":
            renamed["text_projection"] = value.T
        elif module in OPENCLIP:
            renamed[f"{block}{OPENCLIP[module]}.{kind}"] = value
        elif module not in ("self_attn.k_proj", "self_attn.v_proj"):
            raise KeyError(f"text encoder {key}")
    return renamed


PREFIXES = {"unet": UNET, "vae": VAE, "text_encoder": TEXT}
"""Where a part's weights lie in a file."""
RENAMES = {
    "unet": (unet_to_ldm, unet_to_diffusers),
    "vae": (vae_to_ldm, vae_to_diffusers),
    "text_encoder": (text_to_ldm, text_to_diffusers),
}
"""Part -> (weights, config) to the file's names, and back."""
