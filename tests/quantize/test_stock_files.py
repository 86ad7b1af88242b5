"""Diffusers folders, text encoders and other programs' single files in, quantized files out."""

import json
import sys

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distill import layouts
from distill.backbones.stable_diffusion import StableDiffusion
from distill.packed.weight import layers
from distill.quantize import onestep
from distill.quantize.options import Quantize
from distill.quantize.run import quantize_file
from distill.quantize.views import Dequantized

encode = StableDiffusion.encode


@pytest.fixture(autouse=True)
def few_probes(monkeypatch):
    """An eighth of a second rather than a second for each measured candidate."""
    monkeypatch.setattr(onestep, "PROBES", 8)


def test_a_pipeline_s_folder_is_run_as_its_pipeline_runs(pipeline, tmp_path):
    out = tmp_path / "unet.safetensors"
    report = quantize_file(pipeline, out, Quantize(samples=2, steps=3, rows=64))
    assert "2 general prompts at 3 steps of its pipeline" in report.calibration and 0 < report.output_error < 0.3
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(pipeline / "unet")
    dense = Dequantized(load_file(out))
    weights = {k: dense[k].float() for k in unet.state_dict()}  # diffusers' own names
    g = torch.Generator().manual_seed(0)
    x, c = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 32, 128, generator=g)
    with torch.no_grad():
        y = unet(x, 500, c).sample
        unet.load_state_dict(weights)
        assert 0 < (unet(x, 500, c).sample - y).norm() < 0.3 * y.norm()
    again = quantize_file(pipeline / "unet", tmp_path / "b.safetensors", Quantize(samples=2, steps=3, rows=64))
    assert again.output_error == report.output_error


def test_sd3_without_its_t5(tmp_path):
    """Saved without it, or its folder never downloaded: the pipeline runs on CLIP's words, and the report says so."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    words = tiny.tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    clip = CLIPTextConfig(vocab_size=len(words), projection_dim=32, bos_token_id=0, eos_token_id=1, **sizes)
    shape = {"sample_size": 8, "patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 1}
    heads = {"attention_head_dim": 8, "num_attention_heads": 4, "pos_embed_max_size": 96}
    width = {"joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 64}
    diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(**shape, **heads, **width),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8, shift_factor=0.1),
        text_encoder=CLIPTextModelWithProjection(clip),
        text_encoder_2=CLIPTextModelWithProjection(clip),
        tokenizer=words,
        tokenizer_2=words,
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(tmp_path / "sd3")
    index = tmp_path / "sd3" / "model_index.json"
    named = {"text_encoder_3": ["transformers", "T5EncoderModel"], "tokenizer_3": ["transformers", "T5TokenizerFast"]}
    for entries in ({}, named):
        index.write_text(json.dumps(json.loads(index.read_text()) | entries))
        options = Quantize(samples=1, steps=2, rows=16)
        report = quantize_file(tmp_path / "sd3" / "transformer", tmp_path / "o.safetensors", options, force=True)
        assert report.calibration.endswith("of its pipeline without text_encoder_3")
        assert report.method == "awq" and 0 < report.output_error < 0.3


def test_a_folder_that_cannot_be_run_is_quantized_aloud(pipeline, tmp_path, caplog):
    (tmp_path / "alone").symlink_to(pipeline / "unet")
    report = quantize_file(tmp_path / "alone", tmp_path / "x.safetensors")
    assert report.method == "clip" and "model_index.json is not there" in report.calibration
    assert "quantized by its weights alone" in caplog.text


def test_clip_and_t5_folders(pipeline, tmp_path):
    from transformers import T5Config, T5EncoderModel

    words = tiny.tokenizer()
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    T5EncoderModel(T5Config(vocab_size=len(words), **sizes)).save_pretrained(tmp_path / "t5")
    words.save_pretrained(tmp_path / "t5")
    for folder in (pipeline / "text_encoder", tmp_path / "t5"):
        out = tmp_path / f"{folder.name}.safetensors"
        report = quantize_file(folder, out, Quantize(samples=8, rows=64))
        assert report.calibration == "calibrated on 8 general prompts" and 0 < report.output_error < 0.3
        names = layers(load_file(out))
        assert len(names) == 12 and not any("embed" in n or "shared" in n or "bias" in n for n in names)


@pytest.mark.parametrize("names", ["ldm", "bare", "checkpoint"])
def test_other_single_files_keep_their_keys(mods, tmp_path, monkeypatch, names):
    """And are not said to need packages that could not help."""
    monkeypatch.setitem(sys.modules, "accelerate", None)
    unet = layouts.unet_to_ldm(dict(mods.unet.state_dict()), mods.unet.config)
    prefix = "" if names == "bare" else layouts.UNET
    weights = {prefix + k: v for k, v in unet.items()}
    if names == "checkpoint":
        weights |= {layouts.VAE + "decoder.conv.weight": torch.ones(32, 32, 3, 3), "alphas_cumprod": torch.ones(7)}
    save_file(weights, tmp_path / "in.safetensors", {"modelspec.title": "mine"})
    report = quantize_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", Quantize())
    assert report.method == "clip" and "data-free: a single file" in report.calibration
    with safe_open(tmp_path / "out.safetensors", "pt") as f:
        assert f.metadata()["modelspec.title"] == "mine" and "quantization" in f.metadata()
    found = load_file(tmp_path / "out.safetensors")
    assert weights.keys() <= found.keys()
    if names == "checkpoint":
        assert found[layouts.VAE + "decoder.conv.weight"].dtype == torch.float32  # not of a quantized part
    assert found[prefix + "out.0.weight"].dtype == torch.float16
