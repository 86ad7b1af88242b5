"""A check of inside.py: a ControlNet beside a model in 4 bits."""

import comfy.cldm.cldm
import comfy.controlnet
import comfy.ops
import torch
from inside_helpers import CPU, TOLERANCE, error, pair, rand, sample


def controlnet(model) -> comfy.controlnet.ControlNet:
    """A random one for a U-Net, as Stable Diffusion 1.5's are: a copy of its first half with an input for a picture."""
    config = dict(model.model.model_config.unet_config) | {"hint_channels": 3, "dtype": torch.float32, "device": CPU}
    net = comfy.cldm.cldm.ControlNet(**config, operations=comfy.ops.disable_weight_init)
    for i, p in enumerate(net.parameters()):
        p.data = 0.1 * rand(*p.shape, seed=i)
    return comfy.controlnet.ControlNet(net.eval(), load_device=CPU)


def check_a_controlnet_steers_four_bits_as_it_steers_dense():
    q, d = pair()
    control = controlnet(d[0])

    def drawn(model, clip, hint=None):
        cond = clip.encode_from_tokens_scheduled(clip.tokenize("a small red ring"))
        if hint is not None:
            steered = control.copy().set_cond_hint(hint, 1.0, (0.0, 1.0))
            cond = [[c, {**more, "control": steered, "control_apply_to_uncond": True}] for c, more in cond]
        return sample.OneStepSample.execute(model, cond, {"samples": torch.zeros(1, 8, 8, 8)}, 1).args[0]["samples"]

    hints = [torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    free, one, other = (drawn(*d, hint) for hint in (None, *hints))
    assert error(one, free) > 0.01 and error(one, other) > 1e-4
    assert error(drawn(*q, hints[0]), one) < TOLERANCE and error(drawn(*q), free) < TOLERANCE
