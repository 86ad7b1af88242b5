"""Text encoder weights, tokenizer and metadata -> CLIP."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import comfy.clip_model
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.utils
import torch

from ...distill.file.checkpoint import check_fit
from ...distill.file.metadata import Metadata
from ...distill.file.tokens import no_panic, padding, parse, start_and_end
from ...distill.layouts import Weights
from ...distill.packed.weight import layers
from .limits import require, sound
from .ops import operations
from .packed import pack
from .patcher import STATIC, Patcher

FIXED = {"layer_norm_eps": (1e-5,), "hidden_act": tuple(comfy.clip_model.ACTIVATIONS)}


class TextModel(comfy.clip_model.CLIPTextModel):
    """ComfyUI's CLIP with the file's own vocabulary (the stock class has CLIP's 49408 words)."""

    def __init__(self, config, dtype, device, operations):
        super().__init__(config, dtype, device, operations)
        size = config["vocab_size"], config["hidden_size"]
        self.text_model.embeddings.token_embedding = operations.Embedding(*size, dtype=dtype, device=device)


class Words:
    """The file's tokenizer as SDTokenizer wants it: called like one of transformers'."""

    def __init__(self, path: Path, inner):
        self.path, self.inner = path, inner

    def __call__(self, text: str) -> dict[str, list[int]]:
        with no_panic(self.path):
            return {"input_ids": self.inner.encode(text).ids}

    def get_vocab(self) -> dict[str, int]:
        return self.inner.get_vocab()

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        return self.inner.decode(ids, skip_special_tokens=skip_special_tokens)


def build_clip(
    path: Path,
    meta: Metadata,
    weights: Weights,
    embeddings: list[str],
    disable_dynamic: bool = False,
    activations: str = "auto",
) -> comfy.sd.CLIP:
    """HF-keyed CLIPTextModel weights -> CLIP; `embeddings` are the folders of textual inversions."""
    words, length = Words(path, parse(path, meta)), meta.text_encoder["max_length"]
    (start, end), pad = start_and_end(meta), padding(meta)
    config = meta.architecture["text_encoder"] | {"eos_token_id": end}  # where ComfyUI pools
    require(path, "CLIP", config, FIXED)

    class Tokenizer(comfy.sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data=None):
            super().__init__(
                max_length=length,
                embedding_directory=embedding_directory,
                embedding_size=config["hidden_size"],
                pad_token=pad,
                tokenizer_class=SimpleNamespace(from_pretrained=lambda _: words),
            )

    class Encoder(comfy.sd1_clip.SDClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None):
            super().__init__(
                device=device,
                max_length=length,
                dtype=dtype,
                textmodel_json_config=config,
                model_class=TextModel,
                special_tokens={"start": start, "end": end, "pad": pad},
                return_projected_pooled=False,
                model_options=model_options or {},
            )

    target = SimpleNamespace(
        params={"clip_model": Encoder},
        clip=comfy.sd1_clip.SD1ClipModel,
        tokenizer=lambda **kwargs: comfy.sd1_clip.SD1Tokenizer(tokenizer=Tokenizer, **kwargs),
    )
    quantized = bool(layers(weights))
    weights = pack(weights) if quantized else weights
    with sound(path, "CLIP"):
        expected = TextModel(config, None, "meta", comfy.ops.manual_cast).state_dict()
        expected.pop("text_projection.weight", None)
        check_fit(path, "CLIP", expected, weights)
    # ComfyUI projects the pooled text although nothing here takes the projection: give it something to compute
    weights = {"text_projection.weight": torch.eye(config["hidden_size"])} | weights
    options = {"dtype": comfy.utils.weight_dtype(weights)}  # ComfyUI would round to half; it computes in fp32
    if quantized:
        disable_dynamic = True
        options["custom_operations"] = operations(options["dtype"], text=True, activations=activations)
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=embeddings,
        parameters=comfy.utils.calculate_parameters(weights),
        state_dict=[weights],
        model_options=options,
        **(STATIC if disable_dynamic else {}),
    )
    if quantized:
        Patcher.adopt(clip.patcher)
    return clip
