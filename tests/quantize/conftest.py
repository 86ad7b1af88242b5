"""Every test here begins with the same global random state, which torch initialises modules from."""

import pytest
import tiny
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    small = {"layers_per_block": 1, "block_out_channels": (32, 64)}
    return tiny.write(tmp_path_factory.mktemp("student") / "student.safetensors", torch.float16, unet=small)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A tiny random Stable Diffusion as diffusers saves it, with the U-Net in shards."""
    folder = tiny.stable_diffusion(tmp_path_factory.mktemp("pipeline"), max_shard_size="2MB")
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    return folder
