"""Checks of inside.py: OneStepNegative, in numbers on the tiny student, by a judge's readings on the bundled one."""

import comfy.model_management as mm
import torch
from inside_helpers import CPU, FOLDER, TOLERANCE, error, image, native, pair, rand, sample
from inside_setup import imported

negative = imported("nodes.negative")
bundled, shapes = imported("distill.tutorial.bundled").bundled, imported("distill.tutorial.shapes")
Judge = imported("distill.tutorial.judge").Judge


def encode(clip, text: str) -> list:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def check_cross_attention_is_the_positive_s_less_the_negative_s():
    """And a second node subtracts a second prompt; CFG's own negative rows keep what they see."""
    model, clip, _ = native.load(FOLDER / "student.safetensors", [])
    first, second = encode(clip, "a red ring"), encode(clip, "a blue")
    both = negative.subtract(negative.subtract(model, first, 0.3), second, 0.2)
    mm.load_models_gpu([both])
    block = model.model.diffusion_model.middle_block[1].transformer_blocks[0]
    x, context = rand(4, 6, block.norm2.normalized_shape[0]), rand(4, 32, first[0][0].shape[-1], seed=1)
    seen = []
    block.attn2.to_out.register_forward_hook(lambda module, args, out: seen.append(out))
    options = both.model_options["transformer_options"] | {"block": ("middle", 0), "cond_or_uncond": [0, 1]}
    block(x, context, options)
    n = {}
    block.norm2.register_forward_hook(lambda module, args, out: n.setdefault("of", out))
    block(x, context, {})
    parts = [block.attn2(n["of"], context)]
    parts += [block.attn2(n["of"], c[0][0].expand(4, -1, -1)) - block.attn2.to_out[0].bias for c in (first, second)]
    expected = parts[0] - torch.tensor([1.0, 1, 0, 0])[:, None, None] * (0.3 * parts[1] + 0.2 * parts[2])
    assert error(seen[0], expected) < TOLERANCE


def check_a_negative_prompt_on_packed_weights_is_that_on_dense_ones():
    found = []
    for model, clip in pair():
        words = encode(clip, "a large blue star")
        found += [image(negative.subtract(model, words, *s), clip) for s in ((0.0, 0.0), (0.5, 0.0), (0.5, 1.0))]
        found.append(image(model, clip))
    assert error(found[0], found[3]) < TOLERANCE, "strength 0 changes something"
    assert min(error(found[1], found[0]), error(found[2], found[1])) > 0.01
    assert error(found[2], found[6]) < 1e-4


def check_what_is_no_unet_is_told_so():
    from comfy.ldm.flux.model import Flux

    model, clip, _ = native.load(FOLDER / "student.safetensors", [])
    model.model.diffusion_model = object.__new__(Flux)
    try:
        negative.subtract(model, encode(clip, "red"), 0.3)
    except ValueError as e:
        assert "cannot patch Model" in str(e), e
    else:
        raise AssertionError("it was patched")


def check_what_is_negated_becomes_rarer_and_the_rest_stays():
    """What the student draws most often where the prompt leaves it open is named as the negative prompt."""
    model, clip, vae = native.load(bundled("student"), [])
    judge, side = Judge.load(), model.get_attachment("onestep").architecture["unet"]["sample_size"]
    empty = {"samples": torch.zeros(48, 4, side, side, device=CPU)}

    def read(model, prompt: str):
        latent = sample.OneStepSample.execute(model, encode(clip, prompt), empty, 0).args[0]["samples"]
        return judge.read(vae.decode(latent).movedim(-1, 1) * 2 - 1).attributes

    def share(read, name: str, value: int) -> float:
        return (read[:, shapes.NAMES.index(name)] == value).float().mean().item()

    before, after, stays = [], [], []
    for name, prompt, unwanted in (
        ("colour", "a shape on a blue background", "a {} shape"),
        ("colour", "a small shape on a white background", "a {} shape"),
        ("shape", "a small shape on a black background", "a {}"),
        ("shape", "a large shape on a green background", "a {}"),
    ):
        plain = read(model, prompt)
        value = plain[:, shapes.NAMES.index(name)].mode().values.item()
        words = encode(clip, unwanted.format(shapes.ATTRIBUTES[name][value]))
        changed = read(negative.subtract(model, words, 0.3, 2.0), prompt)
        before.append(share(plain, name, value))
        after.append(share(changed, name, value))
        for k, v in shapes.parse(prompt).items():
            stays.append(share(changed, k, shapes.ATTRIBUTES[k].index(v)))
    assert sum(after) < 0.6 * sum(before), (before, after)
    assert sum(stays) > 0.85 * len(stays), stays
    print(before, after, stays)
