"""What is not quantized, and says so; and what is never overwritten."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from distill import layouts
from distill.backbones.stable_diffusion import StableDiffusion
from distill.header import CheckpointError
from distill.packed.weight import QuantError, layers
from distill.quantize import onestep
from distill.quantize.options import Quantize
from distill.quantize.run import quantize_file
from distill.quantize.source import open_source

encode = StableDiffusion.encode


@pytest.fixture(autouse=True)
def few_probes(monkeypatch):
    """An eighth of a second rather than a second for each measured candidate."""
    monkeypatch.setattr(onestep, "PROBES", 8)


def test_refusals_name_the_file_and_the_cure(student, tmp_path):
    out, new = tmp_path / "out.safetensors", tmp_path / "new.safetensors"
    quantize_file(student, out, Quantize(calibrate=False))
    with pytest.raises(CheckpointError, match=r"out.safetensors: is quantized already .* original"):
        quantize_file(out, tmp_path / "twice.safetensors")
    with pytest.raises(CheckpointError, match="no such file"):
        quantize_file(tmp_path / "nothing.safetensors", new)
    with pytest.raises(CheckpointError, match="no config.json there"):
        quantize_file(tmp_path, new)
    with pytest.raises(QuantError, match="awq needs calibration"):
        quantize_file(student, new, Quantize(method="awq", calibrate=False))
    with pytest.raises(QuantError, match=r"a budget of 4.01 bits a weight is below the \d\.\d\d"):
        quantize_file(student, new, Quantize(budget=4.01, calibrate=False))
    with pytest.raises(QuantError, match="leave out --text-encoder"):
        Quantize(format="nvfp4", text_encoder=True)
    with pytest.raises(QuantError, match="no regular expression"):
        Quantize(keep=("(",))
    save_file({"decoder.conv_in.weight": torch.ones(32, 32, 3, 3)}, tmp_path / "vae.safetensors")
    with pytest.raises(QuantError, match="vae.safetensors: no layer to quantize"):
        quantize_file(tmp_path / "vae.safetensors", new)


def test_nothing_good_is_overwritten(student, tmp_path, caplog, monkeypatch):
    """Not the source, not another file unless forced, not by a run that fails; a name says what is written."""
    source, out, few = tmp_path / "m.safetensors", tmp_path / "out.safetensors", Quantize(calibrate=False)
    source.write_bytes(student.read_bytes())
    (tmp_path / "link.safetensors").symlink_to(source)
    for same in (source, tmp_path / "link.safetensors"):
        with pytest.raises(QuantError, match="is the source itself: name another file"):
            quantize_file(source, same, few, force=True)
    assert source.read_bytes() == student.read_bytes()
    out.write_text("precious")
    with pytest.raises(FileExistsError, match="out.safetensors exists: overwrite it with force"):
        quantize_file(source, out, few)

    for problem in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def half(tensors, path, *args, problem=problem):
            path.write_bytes(b"half of it")
            raise problem

        with monkeypatch.context() as patch, pytest.raises(type(problem)):
            patch.setattr("safetensors.torch.save_file", half)
            quantize_file(source, out, few, force=True)
        assert out.read_text() == "precious" and len(list(tmp_path.iterdir())) == 3
    quantize_file(source, out, few, force=True)
    assert layers(load_file(out))
    with pytest.raises(QuantError, match="format gguf:Q4_0 is written to a .gguf file"):
        quantize_file(source, tmp_path / "x.safetensors", Quantize(format="gguf:Q4_0"))
    pytest.importorskip("gguf")
    quantize_file(source, tmp_path / "x.gguf", Quantize())
    assert (tmp_path / "x.gguf").read_bytes()[:4] == b"GGUF" and "written as gguf:Q4_0" in caplog.text


def test_a_file_of_the_source_s_folder_is_the_source(tmp_path):
    unet = tiny.stable_diffusion(tmp_path / "sd") / "unet/diffusion_pytorch_model.safetensors"
    dense = unet.read_bytes()
    with pytest.raises(QuantError, match="is the source itself: name another file"):
        quantize_file(tmp_path / "sd", unet, force=True)
    assert unet.read_bytes() == dense


def test_weights_that_are_not_finite_are_named(student, tmp_path):
    weights = load_file(student)
    weights[layouts.UNET + "middle_block.0.in_layers.2.weight"][0, 0] = torch.nan
    save_file(weights, tmp_path / "nan.safetensors")
    with pytest.raises(QuantError, match=r"nan.safetensors: layer .*middle_block.0.in_layers.2: .* not finite"):
        quantize_file(tmp_path / "nan.safetensors", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"a": "../../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="names files outside its folder"):
        open_source(tmp_path)
