"""Files in, quantized files out: OneStep files, diffusers folders, text encoders, and what is refused."""

import contextlib
import json
import math
import subprocess
import sys

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distill import layouts
from distill.backbones import load
from distill.backbones.stable_diffusion import StableDiffusion
from distill.file import checkpoint
from distill.file.metadata import read_metadata
from distill.header import CheckpointError, read_header
from distill.packed.weight import QuantError, QuantizedWeight, layers, unpack_nibbles
from distill.quantize import onestep
from distill.quantize.budget import DENSE
from distill.quantize.calibrate import LayerStats
from distill.quantize.options import Quantize
from distill.quantize.prompts import GENERAL
from distill.quantize.run import quantize_file
from distill.quantize.source import layers_of, open_source
from distill.quantize.views import Dequantized
from distill.tutorial.bundled import bundled

encode = StableDiffusion.encode


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


@pytest.fixture(autouse=True)
def few_probes(monkeypatch):
    """An eighth of a second rather than a second for each measured candidate."""
    monkeypatch.setattr(onestep, "PROBES", 8)


def metadata(path):
    return json.loads(read_header(path)["__metadata__"]["quantization"])


# ------------------------------------------------------------------------------------------------------- OneStep


@pytest.mark.parametrize("method", ["auto", "rtn", "clip", "scale", "awq", "svd", "smoothquant"])
def test_a_onestep_file_stays_one(student, tmp_path, method):
    out = tmp_path / "small.safetensors"
    report = quantize_file(student, out, Quantize(method=method, rank=4, samples=4, rows=64))
    assert report.size_after == out.stat().st_size < 0.7 * report.size_before
    assert 0 < report.output_error < (0.06 if method == "smoothquant" else 0.3)
    assert report.psnr > 20 and "calibrated on 4 general prompts at t = 999" in report.table()
    before, after = load(student), load(out)
    expected = {"auto": "awq"}.get(method, method)
    assert after.meta.quantization["method"] == metadata(out)["method"] == expected
    assert abs(metadata(out)["bits_per_weight"] - report.bits_per_weight) < 1e-3
    kept = [f.name for f in before.meta.__dataclass_fields__.values() if f.name != "quantization"]
    assert all(getattr(before.meta, k) == getattr(after.meta, k) for k in kept)
    # of eight pictures: single ones of this untrained net lie between 0.04 and 0.08
    images = [m.sample(["a red ring"] * 8, torch.Generator().manual_seed(0)) for m in (before, after)]
    bound = 0.12 if method in ("rtn", "scale") else 0.07
    assert (images[0] - images[1]).square().mean() < bound * images[0].square().mean()


def test_prompts_come_from_the_file_then_the_caller_then_are_general(student, tmp_path, monkeypatch):
    """What each part is calibrated on, and that the report says it."""
    seen = []
    monkeypatch.setattr(StableDiffusion, "encode", lambda self, texts: seen.extend(texts) or encode(self, texts))
    (tmp_path / "p.txt").write_text("a red ring\n\na blue star\na pink heart\n")
    caller = lambda model, n, seed: [f"{seed}"] * n  # noqa: E731
    how, out = {"samples": 2, "rows": 16}, tmp_path / "a.safetensors"
    for prompts, options, said, first, last in (
        (caller, {"prompts": tmp_path / "p.txt"}, "2 prompts", "a red ring", "a pink heart"),
        (caller, {}, "2 prompts", "0", str(onestep.PROBE_SEED)),
        (lambda *_: None, {}, "2 general prompts", GENERAL[0], GENERAL[-1]),
    ):
        seen.clear()
        report = quantize_file(student, out, Quantize(**how, **options), prompts=prompts, force=True)
        assert f"calibrated on {said} at" in report.calibration
        assert seen[0] == first and seen[2] == last  # the first of the probes, which measure


def test_what_is_quantized_and_what_is_not(student, tmp_path):
    out = tmp_path / "small.safetensors"
    report = quantize_file(student, out, Quantize(calibrate=False, text_encoder=True, group_size=32, bits=3))
    found, dense = load_file(out), load_file(student)
    marked = set(layers(found))
    ends = {f"{layouts.UNET}{name}.weight" for name in ("input_blocks.0.0", "out.2")}
    for key, value in dense.items():
        layer = key.removesuffix(".weight")
        if value.ndim < 2 or key.startswith(layouts.VAE) or "embedding." in key or key in ends:
            assert layer not in marked and found[key].dtype == torch.float16 and torch.equal(found[key], value)
    for part in (layouts.UNET, layouts.TEXT):
        assert any(name.startswith(part) for name in marked)
    assert layouts.UNET + "out.2" not in marked and layouts.UNET + "input_blocks.0.0" not in marked
    assert layouts.UNET + "middle_block.0.in_layers.2" in marked
    for name in marked:
        q = QuantizedWeight.from_tensors(found, name)
        assert q.bits == 3 and unpack_nibbles(q.codes).max() < 8 and q.group_size <= 64
    assert {x.name for x in report.layers if not x.choice.startswith("dense")} == marked
    assert report.calibration.startswith("data-free") and report.output_error is None


def test_the_same_seed_gives_the_same_file(student, tmp_path):
    def make(name, seed):
        quantize_file(student, tmp_path / name, Quantize(method="svd", rank=2, samples=2, rows=16, seed=seed))
        return load_file(tmp_path / name)  # the header's order is safetensors' own affair

    a, b, c = make("a", 1), make("b", 1), make("c", 2)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a if k.endswith("low_rank_up"))


def test_a_teacher_is_calibrated_along_its_own_steps(tmp_path):
    path = tiny.write(
        tmp_path / "t.safetensors",
        unet={"layers_per_block": 1},
        method="teacher",
        steps=3,
        guidance={"scale": 2.0, "baked": False},
    )
    report = quantize_file(path, tmp_path / "small.safetensors", Quantize(samples=4, rows=64))
    assert "its own 3 steps" in report.calibration and 0 < report.output_error < 0.3


def test_stats_of_the_caller_are_used(student, tmp_path):
    source = open_source(student)
    chosen = [k for k, why in layers_of(source, ("unet",), 64).items() if why == ""]
    stats, g = {}, torch.Generator().manual_seed(0)
    for i, layer in enumerate(chosen):
        shape = source.entries[layer + ".weight"].shape
        rows = torch.randn(32, math.prod(shape[1:]), generator=g)
        stats[layer + (".weight" if i % 2 else "")] = LayerStats(torch.rand(shape[1], generator=g) + 0.1, rows)
    report = quantize_file(student, tmp_path / "a.safetensors", Quantize(), stats)
    assert report.method == "awq" and report.calibration == "calibrated by the caller"
    assert all(x.kind == "output" for x in report.layers if x.error is not None)


# --------------------------------------------------------------------------------------------- mixed precision


@pytest.mark.parametrize("calibrate", [True, False])
def test_the_budget_is_kept_and_spent(student, tmp_path, calibrate):
    how = {"samples": 2, "rows": 16, "calibrate": calibrate, "keep": (r"label_emb",)}
    reports = [
        quantize_file(student, tmp_path / "a.safetensors", Quantize(budget=b, **how), force=True) for b in (5.5, 7.0)
    ]
    for report, budget in zip(reports, (5.5, 7.0)):
        assert budget - 0.2 < report.bits_per_weight <= budget
    assert len({x.choice for x in reports[1].layers}) > 2
    assert reports[0].sensitivity.startswith("the output error of the whole" if calibrate else "the relative error")
    assert sum(x.bits_per_weight * x.numel for x in reports[1].layers) > 0
    told = metadata(tmp_path / "a.safetensors")
    assert told["budget"] == 7.0 and len(told["layers"]) == len(reports[1].layers)
    assert all(v == "dense (asked for)" for k, v in told["layers"].items() if "label_emb" in k)
    if calibrate:
        assert reports[1].output_error < reports[0].output_error


# ----------------------------------------------------------------------------------------- diffusers, transformers


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


# ------------------------------------------------------------------------------------------------- what is refused


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


def test_damage_is_a_square(student):
    """So that damages of independent layers add up: a weight twice as far off does four times the damage."""
    from distill.quantize.opening import open_runnable

    source = open_source(student)
    runs, _ = open_runnable(source, Quantize(samples=8, rows=16), ("unet",))
    layer = "model.diffusion_model.middle_block.0.in_layers.2"
    runs.calibrate([layer], Quantize(samples=8, rows=16), lambda *told: None)
    dense = source[f"{layer}.weight"].float()
    noise = 1e-3 * torch.randn(dense.shape, generator=torch.Generator().manual_seed(0))

    class Off:
        def __init__(self, by):
            self.by = by

        def dequantize(self):
            return dense + self.by * noise

    one, two = (runs.damage(layer, dense, Off(by)) for by in (1, 2))
    assert one > 0 and two / one == pytest.approx(4, rel=0.1)
    assert runs.damage(layer, dense, Off(0)) == 0


def test_damage_is_a_square_where_the_model_is_not_run(student):
    """Of the relative error of each layer's weight, so that it adds up over layers as the end-to-end one does."""
    from distill.quantize.layerwise import Quantizer

    source, layer = open_source(student), "model.diffusion_model.middle_block.0.in_layers.2"
    work = Quantizer(source, Quantize(budget=6.0), "clip", {}, lambda *told: None)
    measure, said = work.sensitivity([layer], None)
    assert said.endswith("each layer's weight")
    dense, found = work.dense(layer), {o.choice: o.damage for o in work.offers(layer, measure)}
    assert len(found) > 2
    for choice, damage in found.items():
        if choice != DENSE:
            rounded = work.layer(layer, dense, choice).dequantize()
            assert damage == pytest.approx(((rounded - dense).norm() / dense.norm()).item() ** 2, rel=1e-3)


def test_w8a8_is_reported_with_its_rounded_activations(student, tmp_path, monkeypatch):
    """The report's error is that of the kernels: more than the weights' alone, and what running the file gives."""
    from distill.packed import dispatch
    from distill.quantize import runnable

    options = Quantize(method="smoothquant", samples=8, rows=64)
    report = quantize_file(student, tmp_path / "a.safetensors", options)
    with monkeypatch.context() as patch:
        patch.setattr(runnable, "rounding_activations", lambda *a: contextlib.nullcontext())
        weights_alone = quantize_file(student, tmp_path / "b.safetensors", options).output_error
    assert report.output_error > 1.1 * weights_alone
    from distill.backbones import load

    monkeypatch.setattr(dispatch, "WORTH", 0)
    dense, small = load(student), load(tmp_path / "a.safetensors")
    z, cond = (
        torch.randn(dense.shape(16), generator=torch.Generator().manual_seed(1)),
        dense.encode(["a red ring"] * 16),
    )
    with torch.no_grad():
        a, b = dense.latents(z, cond), small.latents(z, cond)
    assert ((a - b).norm() / a.norm()).item() == pytest.approx(report.output_error, rel=0.35)


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


# ------------------------------------------------------------------------------------- written again, and built


def test_half_precision_leaves_quantized_layers_as_they_are(student, tmp_path):
    out = tmp_path / "small.safetensors"
    quantize_file(student, out, Quantize(calibrate=False))
    weights = load_file(out)
    name = layers(weights)[0]
    weights[f"{name}.weight_scale"] = weights[f"{name}.weight_scale"].float() + 1e-9  # fp16 would lose it
    whole = checkpoint.Checkpoint(weights, read_metadata(out))
    again = load_file(checkpoint.write(tmp_path / "again.safetensors", whole, torch.float16))
    assert again.keys() == weights.keys()
    for key, value in weights.items():
        kept = key.rpartition(".")[0] in layers(weights) and not key.endswith("bias")
        assert again[key].dtype == (value.dtype if kept or not value.is_floating_point() else torch.float16), key
        assert torch.equal(again[key], value.to(again[key].dtype))


def test_a_quantized_file_survives_unpack_and_pack(student, tmp_path):
    out = tmp_path / "small.safetensors"
    quantize_file(student, out, Quantize(calibrate=False, text_encoder=True))
    before = checkpoint.read(out)
    after = checkpoint.pack(checkpoint.unpack(before))
    assert before.weights.keys() == after.weights.keys() and before.meta == after.meta
    assert all(torch.equal(before.weights[k], after.weights[k]) for k in before.weights)


def test_a_layer_of_another_shape_is_told_with_the_file(student, tmp_path):
    out = tmp_path / "small.safetensors"
    quantize_file(student, out, Quantize(calibrate=False))
    architecture = read_metadata(out).architecture
    architecture["unet"]["block_out_channels"] = [32, 96]
    strings = read_header(out)["__metadata__"] | {"architecture": json.dumps(architecture)}
    save_file(load_file(out), tmp_path / "wrong.safetensors", strings)
    with pytest.raises(
        CheckpointError, match="wrong.safetensors: wrong architecture: the unet's layer .*the layer's is .192, 128.."
    ):
        tiny.build(tmp_path / "wrong.safetensors")


# --------------------------------------------------------------------------------------------------- command line


def distill(*args):
    command = [sys.executable, "-m", "distill", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_the_bundled_student_on_the_command_line(tmp_path):
    out = tmp_path / "student-4bit.safetensors"
    done = distill("quantize", "student", out, "--samples", 8, "--report", tmp_path / "report.json")
    assert done.returncode == 0, done.stderr
    assert "bits per weight" in done.stdout and "PSNR" in done.stdout and "calibrating" in done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    # a short prompt leaves much open, and a rounding may decide it otherwise: an error of that picture, no blur of all
    assert report["output_error"] < 0.3 and report["psnr"] > 25 and report["bits_per_weight"] < 4.6
    assert not read_metadata(out).metrics  # those were the dense student's
    assert len(report["layers"]) == 91 and out.stat().st_size < 0.58 * bundled("student").stat().st_size
    assert '"method": "awq"' in distill("info", out).stdout
    made = distill("sample", "a large red ring", "--model", out, "--out", tmp_path / "a.png")
    assert made.returncode == 0 and (tmp_path / "a.png").is_file(), made.stderr
    refused = distill("quantize", out, tmp_path / "twice.safetensors")
    assert refused.returncode == 2 and "is quantized already" in refused.stderr and "Traceback" not in refused.stderr
