"""The file contract: both directions, atomic writing, and errors that name the file and the cure."""

import json
import os

import pytest
import tiny
import torch

from distill import layouts
from distill.file import checkpoint
from distill.file.metadata import read_metadata
from distill.header import CheckpointError, read_header
from distill.tutorial.bundled import bundled

PROMPTS = ["a small red ring on a blue background, top left", ""]
VARIANTS = {
    "tutorial": {},
    "linear projection": {"use_linear_projection": True},
    "three levels": {
        "block_out_channels": (32, 64, 128),
        "layers_per_block": [1, 2, 1],
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
    },
}


@pytest.fixture(scope="module")
def path(mods, tmp_path_factory):
    file = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    return checkpoint.write(file, checkpoint.pack(tiny.pipeline(mods)))


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.fixture(scope="module")
def kl():
    return tiny.modules(vae="kl")


@pytest.mark.parametrize("kind", ["mods", "kl"])
def test_round_trip_is_exact(kind, tmp_path, request):
    mods = request.getfixturevalue(kind)
    path = checkpoint.write(tmp_path / "x.safetensors", checkpoint.pack(tiny.pipeline(mods)))
    built = tiny.build(path)
    for before, after in zip(mods[:3], built[:3], strict=True):
        same(before.state_dict(), after.state_dict())
    assert (
        mods.tokenizer(PROMPTS, padding="max_length").input_ids
        == built.tokenizer(PROMPTS, padding="max_length").input_ids
    )
    same(tiny.encode(mods, PROMPTS), tiny.encode(built, PROMPTS))
    assert read_metadata(path) == checkpoint.read(path).meta


def test_half_precision_halves_the_file(mods, path, tmp_path):
    half = checkpoint.write(tmp_path / "half.safetensors", checkpoint.pack(tiny.pipeline(mods)), torch.float16)
    assert half.stat().st_size < 0.6 * path.stat().st_size
    built = tiny.build(half)
    assert {w.dtype for m in built[:3] for w in m.parameters()} == {torch.float32}
    for before, after in zip(mods.unet.parameters(), built.unet.parameters(), strict=True):
        torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_unet_names_are_a_bijection(variant):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**tiny.UNET | VARIANTS[variant])
    ldm = layouts.unet_to_ldm(unet.state_dict(), unet.config)
    assert len(ldm) == len(unet.state_dict()) and "middle_block.1.proj_in.weight" in ldm
    same(unet.state_dict(), layouts.unet_to_diffusers(ldm, unet.config))


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_vae_names_are_a_bijection(levels):
    from diffusers import AutoencoderKL

    blocks = {"block_out_channels": (32, 32, 64, 64)[:levels], "layers_per_block": 2}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    vae = AutoencoderKL(**tiny.VAE | blocks | kinds)
    ldm = layouts.vae_to_ldm(vae.state_dict(), vae.config)
    assert len(ldm) == len(vae.state_dict()) and ldm["decoder.mid.attn_1.q.weight"].ndim == 4
    same(vae.state_dict(), layouts.vae_to_diffusers(ldm, vae.config))


def test_diffusers_reads_our_vae_names(kl):
    """diffusers' own converter, as an oracle."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    vae = kl.vae
    ldm = layouts.vae_to_ldm(vae.state_dict(), vae.config)
    same(
        vae.state_dict(), convert_ldm_vae_checkpoint({f"first_stage_model.{k}": v for k, v in ldm.items()}, vae.config)
    )


def test_diffusers_reads_our_unet_names(mods):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet = mods.unet
    config = dict(unet.config) | {"use_linear_projection": False}
    ldm = layouts.unet_to_ldm(unet.state_dict(), config)
    ldm = {f"model.diffusion_model.{k}": v for k, v in ldm.items()}
    same(unet.state_dict(), convert_ldm_unet_checkpoint(ldm, config))


def test_metadata_is_flat_strings_and_has_the_contract_s_keys(path):
    strings = read_header(path)["__metadata__"]
    assert all(isinstance(v, str) for v in strings.values())
    named = "method teacher architecture prediction schedule t_in guidance latent text_encoder metrics config license"
    assert strings.keys() >= {"onestep.version", *named.split()}
    assert strings["t_in"] == "999" and strings["prediction"] == "x0" and json.loads(strings["schedule"]) == tiny.DDPM


def test_keys_are_stable_diffusion_s(kl):
    keys = checkpoint.pack(tiny.pipeline(kl)).weights.keys()
    assert "model.diffusion_model.label_emb.0.0.weight" in keys
    assert "first_stage_model.decoder.up.3.upsample.conv.weight" in keys
    assert "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight" in keys


def test_a_failed_write_leaves_the_old_file(mods, path, tmp_path, monkeypatch):
    file = tmp_path / "student.safetensors"
    file.write_bytes(path.read_bytes())

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write(file, checkpoint.pack(tiny.pipeline(mods)))
    assert file.read_bytes() == path.read_bytes() and [f.name for f in tmp_path.iterdir()] == [file.name]


# ------------------------------------------------------------------------------------------------ errors


def broken(tmp_path, data: bytes):
    file = tmp_path / "broken.safetensors"
    file.write_bytes(data)
    return file


def fails(file, *words):
    with pytest.raises(CheckpointError) as e:
        checkpoint.read(file)
    first = str(e.value).splitlines()[0]
    assert all(word in first for word in (str(file), *words)), first


def test_missing_file(tmp_path):
    fails(tmp_path / "absent.safetensors", "no such file", "choose another")


@pytest.mark.parametrize(
    ("data", "cure"),
    [
        (b"", "is empty. Download it again"),
        (b"PK\x03\x04 a zip archive", "may run code when it is opened. Get the model as safetensors"),
        (b"\x80\x04 a pickle", "may run code when it is opened. Get the model as safetensors"),
        (b"\x00" * 64, "download it again"),
        (bytes(range(129, 250)), "download it again"),
    ],
)
def test_not_safetensors(tmp_path, data, cure):
    fails(broken(tmp_path, data), "not a safetensors file", cure)
    with pytest.raises(CheckpointError, match=cure):
        read_header(tmp_path / "broken.safetensors")


def test_git_lfs_pointer(tmp_path):
    data = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    fails(broken(tmp_path, data), "not a safetensors file", "git lfs pull")


@pytest.mark.parametrize("keep", [0.9999, 0.5, 0.002])
def test_truncated(path, tmp_path, keep):
    data = path.read_bytes()
    fails(broken(tmp_path, data[: int(len(data) * keep)]), "truncated", "Download it again")


def rewrite(path, tmp_path, drop=None, **strings):
    from safetensors.torch import load_file, save_file

    metadata = read_header(path)["__metadata__"] | strings
    metadata.pop(drop, None)
    save_file(load_file(path), tmp_path / "broken.safetensors", metadata)
    return tmp_path / "broken.safetensors"


def test_not_a_onestep_file(path, tmp_path):
    fails(rewrite(path, tmp_path, drop="onestep.version"), "not a OneStep file", "ComfyUI's own loaders")


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("onestep.version", "2", "Update OneStep"),
        ("prediction", "score", "'score'"),
        ("schedule", '{"kind": "cosine"}', "'cosine'"),
        ("schedule", "{", "not JSON"),
        ("schedule", "[]", "not an object"),
        ("t_in", "1001", "1001"),
        ("t_in", '"last"', "'last'"),
        ("steps", "0", "0"),
        ("latent", '{"channels": 4}', "'architecture.unet.in_channels' is 8, not 4"),
        ("architecture", "{}", "'architecture.unet' is None, not an object"),
    ],
)
def test_wrong_metadata(path, tmp_path, key, value, problem):
    fails(rewrite(path, tmp_path, **{key: value}), problem, key.removeprefix("onestep."))


@pytest.mark.parametrize("key", ["architecture", "prediction", "schedule", "t_in", "latent", "text_encoder"])
def test_missing_metadata(path, tmp_path, key):
    fails(rewrite(path, tmp_path, drop=key), repr(key), "is missing", "Download the file again, or make it again with")


def test_writing_wrong_metadata_fails_before_the_file_exists(mods, tmp_path):
    with pytest.raises(CheckpointError, match="t_in"):
        checkpoint.write(tmp_path / "x.safetensors", checkpoint.pack(tiny.pipeline(mods, t_in=2000)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [{"block_out_channels": [64, 128]}, {"layers_per_block": 3}, {"class_embed_type": None}, {"norm_num_groups": 5}],
)
def test_wrong_architecture(path, tmp_path, change):
    architecture = read_metadata(path).architecture
    architecture["unet"] |= change
    file = rewrite(path, tmp_path, architecture=json.dumps(architecture))
    with pytest.raises(CheckpointError, match="architecture") as e:
        tiny.build(file)
    assert str(file) in str(e.value).splitlines()[0]


def test_bundled_names_what_is_missing():
    with pytest.raises(CheckpointError, match="nothing.safetensors"):
        bundled("nothing")
