"""A negative prompt for models that are called once, without a second prediction: subtraction in cross-attention."""

from __future__ import annotations

import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from torch import Tensor


class OneStepNegative(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OneStepNegative",
            display_name="OneStep Negative",
            category="OneStep",
            description="A negative prompt that works in one step and without CFG: in every cross-attention layer, "
            "what the image sees of the negative prompt is subtracted. For U-Nets: SD 1.x and 2.x, SDXL, OneStep's "
            "own. Other architectures (Flux, SD3, ...) cannot be patched.",
            search_aliases=["negative prompt", "NASA", "NAG", "negative guidance", "without cfg", "turbo negative"],
            inputs=[
                io.Model.Input("model", tooltip="A U-Net of any loader, dense or in 4 bits; through any LoRA."),
                io.Conditioning.Input(
                    "negative",
                    tooltip="What the image must not show, encoded with the model's own CLIP. Short is best: name "
                    "the one thing.",
                ),
                io.Float.Input(
                    "strength",
                    default=0.3,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How much is subtracted; 0: nothing. The method's authors take 0.1 for SD 1.5 and 0.2 for "
                    "SD 2.1. Too much spoils the image.",
                ),
                io.Float.Input(
                    "pooled",
                    default=0.0,
                    min=0.0,
                    max=8.0,
                    step=0.25,
                    tooltip="How far the prompt's pooled text is moved away from the negative one's, in networks that "
                    "take it beside cross-attention: SDXL, OneStep's own. 0: not at all. The bundled student reads "
                    "colours and shapes there: 2 suits it.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="For OneStep Sample or any other sampler; its CFG can stay at 1."
                )
            ],
        )

    @classmethod
    def execute(cls, model, negative, strength, pooled) -> io.NodeOutput:
        return io.NodeOutput(subtract(model, negative, strength, pooled))


def subtract(model, negative: list, strength: float, pooled: float = 0.0):
    """A MODEL in whose cross-attention Z = Z_pos - strength Z_neg, with the same projections for both prompts:
    negative-away steer attention, NASA (Nguyen et al. 2024, arXiv 2412.02687). Pooled text, of which NASA does not
    speak, becomes y + pooled (y - y_neg), as in guidance. Raises ValueError for no U-Net.

    The negative tokens travel behind the positive ones through the layers that make keys and values, so LoRA and packed
    weights apply to both, and part from them where attention is computed.
    """
    net = model.model.diffusion_model
    if not isinstance(net, UNetModel):
        raise ValueError(
            f"OneStep Negative cannot patch {type(model.model).__name__}: ComfyUI lets nodes replace the "
            "cross-attention of U-Nets only (SD 1.x and 2.x, SDXL, OneStep's). Remove the node, or use CFG instead."
        )
    tokens = torch.cat([entry[0] for entry in negative], 1)  # (1, L, D)
    model = model.clone()

    def add(q: Tensor, context: Tensor, value: Tensor, extra: dict) -> tuple[Tensor, Tensor, Tensor]:
        more = tokens.to(context).expand(len(context), -1, -1)
        return q, torch.cat([context, more], 1), torch.cat([value, more], 1)

    model.set_model_attn2_patch(add)
    others = model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
    blocks = [("middle", 0)]
    blocks += [(name, i) for name in ("input", "output") for i in range(len(getattr(net, f"{name}_blocks")))]
    for block in {*blocks, *others}:
        model.set_model_attn2_replace(attend(tokens.shape[1], strength, others.get(block)), *block)
    unwanted = negative[0][1].get("pooled_output")
    if pooled and unwanted is not None:
        model.add_wrapper(WrappersMP.DIFFUSION_MODEL, move_away(unwanted, pooled))
    return model


def move_away(unwanted: Tensor, strength: float):
    """ComfyUI's wrapper around a U-Net, whose y (B, P + ...) begins with P numbers of pooled text; unwanted: (1, P)."""

    def wrapper(call, x, timesteps, context, y, control, options, **more):
        if y is not None:
            size = unwanted.shape[-1]
            share = positive_rows(strength, options["cond_or_uncond"], y)[:, None]
            y = torch.cat([y[:, :size] + share * (y[:, :size] - unwanted.to(y)), y[:, size:]], 1)
        return call(x, timesteps, context, y, control, options, **more)

    return wrapper


def positive_rows(strength: float, groups: list[int], like: Tensor) -> Tensor:
    """(B,): strength for rows of a positive prompt (group 0); CFG's own negative ones keep what they see: 0."""
    share = torch.tensor([strength * (g == 0) for g in groups], dtype=like.dtype, device=like.device)
    return share.repeat_interleave(len(like) // len(groups))


def attend(length: int, strength: float, other=None):
    """ComfyUI's attn2 replacement (q, k, v (B, N, heads D), extra) -> (B, N, heads D), where the last `length` tokens
    of k and v are negative. other: the replacement that was there, which gets the rest."""

    def attention(q: Tensor, k: Tensor, v: Tensor, extra: dict) -> Tensor:
        if other is None:
            return optimized_attention(q, k, v, extra["n_heads"], attn_precision=extra["attn_precision"])
        return other(q, k, v, extra)

    def replacement(q: Tensor, k: Tensor, v: Tensor, extra: dict) -> Tensor:
        positive = attention(q, k[:, :-length], v[:, :-length], extra)
        unwanted = optimized_attention(
            q, k[:, -length:], v[:, -length:], extra["n_heads"], attn_precision=extra["attn_precision"]
        )
        return positive - positive_rows(strength, extra["cond_or_uncond"], q)[:, None, None] * unwanted

    return replacement
