"""The tutorial's text encoder: CLIP's text model in small, with a word tokenizer.

As in Stable Diffusion it is trained first and then frozen, so prompts can be encoded once and cached. Where CLIP learns
from pairs of pictures and captions, this one learns to make every attribute of a prompt linearly readable from its
pooled output, and to read "not stated" where the prompt is silent.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from . import shapes
from .fit import fit

MAX_LENGTH = 32
SPECIAL = ("<|startoftext|>", "<|endoftext|>", "<|unknown|>")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, <|unknown|> for others; pads with the end token as Stable Diffusion does."""
    words = [*SPECIAL, *shapes.vocabulary()]
    start, end, unknown = SPECIAL
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=unknown))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(f"{start} $A {end}", special_tokens=[(start, 0), (end, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=start,
        eos_token=end,
        unk_token=unknown,
        pad_token=end,
        model_max_length=MAX_LENGTH,
    )


def make_encoder() -> CLIPTextModel:
    vocabulary = len(SPECIAL) + len(shapes.vocabulary())
    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH, projection_dim=128, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return CLIPTextModel(config)


def tokens(tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> Tensor:
    """Token ids padded with the end token, (B, 32)."""
    return tokenizer(
        prompts, padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
    ).input_ids


class _Readable(nn.Module):
    """The encoder with one linear head per attribute, the heads only for training."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = make_encoder()
        self.heads = nn.ModuleList(nn.Linear(128, len(v) + 1) for v in shapes.ATTRIBUTES.values())


def train(
    minutes: float = 2, seed: int = 0, work: Path | None = None, batch: int = 128
) -> tuple[CLIPTextModel, PreTrainedTokenizerFast]:
    torch.manual_seed(seed)  # the initial weights
    model, tokenizer = _Readable(), make_tokenizer()

    def loss(generator: torch.Generator) -> Tensor:
        attributes = shapes.sample_attributes(batch, generator)
        stated = shapes.sample_stated(batch, generator) & (torch.rand(batch, 1, generator=generator) > 0.05)
        prompts = [shapes.prompt(a, s) if s.any() else "" for a, s in zip(attributes, stated)]
        ids = tokens(tokenizer, prompts)
        pooled = model.encoder(ids).pooler_output
        target = torch.where(stated, attributes, torch.tensor([len(v) for v in shapes.ATTRIBUTES.values()]))
        return sum(F.cross_entropy(h(pooled), t) for h, t in zip(model.heads, target.T))

    return fit(model, loss, minutes, 1e-3, seed=seed, name="text", work=work)[0.999].encoder, tokenizer


@torch.no_grad()
def encode(encoder: CLIPTextModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> dict[str, Tensor]:
    """Prompts to the U-Net's keyword arguments: encoder_hidden_states (B, 32, 128) and class_labels (B, 128)."""
    out = encoder(tokens(tokenizer, prompts))
    return {"encoder_hidden_states": out.last_hidden_state, "class_labels": out.pooler_output}
