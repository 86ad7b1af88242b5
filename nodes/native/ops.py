"""ComfyUI's layers with quantized weights: what its models are built of instead of `comfy.ops`.

A Linear or Conv2d takes an entry of the state dict that is `Packed`, in our formats through `QuantizedLayer`, in
ComfyUI's own formats through ComfyUI's own class; dense weights go the ordinary way. A quantized layer shows ComfyUI a
`weight` of the dense shape and holds none.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import comfy.lora
import comfy.model_management as mm
import comfy.ops
import torch
import torch.nn.functional as F
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ...distill.packed.layers import QuantizedLayer
from ...distill.packed.weight import QuantizedWeight
from .lora import Branch, are_low_rank, branches
from .packed import Packed, StockWeight

MIXED = SimpleNamespace(quant_config={"mixed_ops": True})  # asks ComfyUI for its operations on quantized weights


def operations(dtype: torch.dtype, text: bool = False, activations: str = "auto"):
    """A class to build a model with, computing in `dtype`. `activations`: see distill.packed.layers."""
    if text:  # as ComfyUI does: text encoders compute in full precision whatever the format
        base = comfy.ops.mixed_precision_ops(MIXED.quant_config, dtype, full_precision_mm=True)
    else:
        base = comfy.ops.pick_operations(None, dtype, model_config=MIXED)

    class Operations(base):
        class Linear(Quantized, base.Linear):
            pass

        class Conv2d(Quantized, base.Conv2d):
            pass

    for layer in (Operations.Linear, Operations.Conv2d):
        layer.activations, layer.compute_dtype = activations, dtype
    return Operations


class Quantized(QuantizedLayer):
    """In front of one of comfy.ops' layers."""

    compute_dtype: torch.dtype
    _key, _patches, _hook_patches = "", (), ()
    _plan: tuple[tuple, list[Branch] | None] | None = None  # what the patches come to, for one device and type

    def __init__(self, *args, device=None, dtype=None, **kwargs):
        super().__init__(*args, device=device, dtype=dtype, **kwargs)
        self.first_device = device
        # no memory for a dense weight before it is known that there is one
        self.weight = torch.nn.Parameter(torch.empty(self.dense_shape, device="meta", dtype=dtype), requires_grad=False)

    @property
    def dense_shape(self) -> torch.Size:
        if isinstance(self, torch.nn.Conv2d):
            return torch.Size((self.out_channels, self.in_channels // self.groups, *self.kernel_size))
        return torch.Size((self.out_features, self.in_features))

    @property
    def weight(self):
        """What everybody but this class sees: the dense parameter, or something that looks like it."""
        dense, codes = self._parameters.get("weight"), self._buffers.get("weight")
        if dense is None and (codes is None or not self.is_quantized):
            raise AttributeError("weight")
        return dense if dense is not None else Packed(self.get_quantized(), self.compute_dtype, codes.device)

    # ------------------------------------------------------------------------------------------ state dict

    def _load_from_state_dict(self, sd: dict, prefix: str, metadata, strict, missing, unexpected, errors):
        weight = sd.get(f"{prefix}weight")
        if weight is not None and weight.shape != self.dense_shape:
            errors.append(f"{prefix}weight is {tuple(weight.shape)}, not {tuple(self.dense_shape)}.")
            return
        held = getattr(weight, "held", None)
        if isinstance(held, StockWeight) and not isinstance(self, torch.nn.Conv2d):
            del sd[f"{prefix}weight"]
            sd |= {f"{prefix}{name}": t for name, t in held.tensors.items()}
            super()._load_from_state_dict(sd, prefix, metadata, strict, missing, unexpected, errors)
        elif isinstance(held, QuantizedWeight):
            del sd[f"{prefix}weight"]
            held = held.to(self.first_device or "cpu")
            kept = {f: t.clone() for f, t in held.fields().items()}  # set_quantized takes the tensors as they are
            self.set_quantized(replace(held, **kept))
            torch.nn.Module._load_from_state_dict(self, sd, prefix, metadata, strict, missing, unexpected, errors)
            own = {f"{prefix}{name}" for name in self._buffers}
            missing[:] = [k for k in missing if k not in own]
        else:
            self._load_dense(weight, sd, prefix, metadata, strict, missing, unexpected, errors)

    def _load_dense(self, weight: Tensor | None, sd: dict, prefix: str, metadata, strict, missing, unexpected, errors):
        convolution = isinstance(self, torch.nn.Conv2d)
        if weight is None or convolution:  # nothing to replace the parameter, or something to copy into it
            room = torch.zeros(self.dense_shape, dtype=self._parameters["weight"].dtype, device=self.first_device)
            self._parameters["weight"] = torch.nn.Parameter(room, requires_grad=False)
        if isinstance(weight, Packed):  # a convolution in a format of ComfyUI's own
            sd[f"{prefix}weight"] = weight.dense()
        if weight is None and not convolution:  # ComfyUI's Linear would have no weight at all then
            torch.nn.Module._load_from_state_dict(self, sd, prefix, metadata, strict, missing, unexpected, errors)
        else:
            super()._load_from_state_dict(sd, prefix, metadata, strict, missing, unexpected, errors)

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        if not self.is_quantized:
            return super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        destination = {} if destination is None else destination
        self._save_to_state_dict(destination, prefix, keep_vars)
        return destination

    def saved(self, name: str, patches: list[tuple]) -> dict[str, Tensor]:
        """The layer's weight as a file holds it, with patches: LoRA joins the low-rank branch, others make it dense."""
        w = self.get_quantized()
        plain = self._branches_of(patches)
        if plain is None:
            dense = self.patched_weight(patches, w.codes.device, torch.float32)
            return {f"{name}.weight": dense.to(self.compute_dtype).contiguous()}
        if plain:
            w = with_branches(w, plain)
        return w.to_tensors(name)

    # ------------------------------------------------------------------------------------------ patches

    def set_patches(self, key: str, patches: list[tuple]) -> None:
        self._key, self._patches, self._plan = key, tuple(patches), None

    def set_hook_patches(self, patches: list[tuple]) -> None:
        """Patches on top of the others, for part of a sampling."""
        if self._hook_patches or patches:
            self._hook_patches, self._plan = tuple(patches), None

    def is_low_rank(self, patches) -> bool:
        """Whether the layer takes these patches without its dense weight."""
        return are_low_rank(patches) and (not patches or getattr(self, "groups", 1) == 1)

    def _branches_of(self, patches) -> list[Branch] | None:
        return branches(patches, self.dense_shape, self._key) if self.is_low_rank(patches) else None

    def _branches(self, x: Tensor) -> list[Branch] | None:
        """All patches as branches on x's device and in its type; None where the dense weight is needed."""
        if not self._patches and not self._hook_patches:
            return []
        kind = (x.device, x.dtype)
        if self._plan is None or self._plan[0] != kind:
            found = self._branches_of([*self._patches, *self._hook_patches])
            self._plan = kind, found if found is None else [b.to(*kind) for b in found]
        plan = self._plan[1]
        if self._buffers["weight"].device != x.device:  # left in slower memory: its branches are, too
            self._plan = None
        return plan

    def patched_weight(self, patches, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A new dense weight with the patches in it, as ComfyUI computes it."""
        weight = self.get_quantized().to(device).dequantize(dtype)
        if not patches:
            return weight
        original = {self._key: [(self.weight, self.convert_weight)]}
        return comfy.lora.calculate_weight(patches, weight, self._key, dtype, original_weights=original)

    def convert_weight(self, weight, inplace=False, **kwargs):
        """ComfyUI asks for this before it computes with a weight."""
        if isinstance(weight, Packed):
            return weight.dense()
        stock = getattr(super(), "convert_weight", None)
        return weight if stock is None else stock(weight, inplace=inplace, **kwargs)

    def set_weight(self, weight: Tensor, inplace_update=False, seed=None, return_weight=False, **kwargs):
        """How ComfyUI puts a patched weight back. Its own refuses to do it in place, which hooks ask for."""
        current = self._parameters["weight"]  # a quantized layer never comes here: see patcher.py
        if isinstance(current, QuantizedTensor):
            return super().set_weight(weight, inplace_update, seed, return_weight, **kwargs)
        weight = weight.to(current.dtype)
        if return_weight:
            return weight
        if inplace_update:
            current.data.copy_(weight)
        else:
            self.weight = torch.nn.Parameter(weight, requires_grad=False)
        return None

    # ------------------------------------------------------------------------------------------ computing

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if not self.is_quantized:
            return super().forward(x, *args, **kwargs)
        comfy.ops.run_every_op()
        bias, plain = self._cast_bias(x), self._branches(x)
        if plain is None or self.weight_function:
            return self._dense_forward(x, bias)
        w = self.get_quantized()
        y = self._compute(w if w.codes.device == x.device else w.to(x.device), x, bias)
        for branch in plain:
            if isinstance(self, torch.nn.Conv2d):
                branch.conv(x, y, stride=self.stride, padding=self.padding, dilation=self.dilation)
            else:
                branch.linear(x, y)
        return y

    def _cast_bias(self, x: Tensor) -> Tensor | None:
        if self.bias is None:
            return None
        bias = self.bias.to(x.device, x.dtype, copy=bool(self.bias_function))
        for function in self.bias_function:
            bias = function(bias)
        return bias

    def _dense_forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Patches that are not low-rank, and functions of the weight: on the dense weight, which goes again at once."""
        patches = [*self._patches, *self._hook_patches]
        weight = self.patched_weight(patches, x.device, mm.lora_compute_dtype(x.device)).to(x.dtype)
        for function in self.weight_function:
            weight = function(weight)
        if isinstance(self, torch.nn.Conv2d):
            return self._conv_forward(x, weight, bias)
        return F.linear(x, weight, bias)


def with_branches(w: QuantizedWeight, found: list[Branch]) -> QuantizedWeight:
    """Branches beside a layer -> the branch in its file. That one sees x * pre_quant_scale, so it is divided out."""
    ups, downs = [], []
    for b in found:
        up = torch.zeros(w.shape[0], b.up.shape[1], dtype=torch.float32, device=b.up.device)
        up[b.rows] = b.up.float()
        down = torch.zeros(b.down.shape[0], *w.shape[1:], dtype=torch.float32, device=b.down.device)
        down[:, b.columns] = b.down.float()
        if w.pre_quant_scale is not None:
            down = down / w.pre_quant_scale.float().to(down.device).view(-1, *[1] * (down.ndim - 2))
        ups.append(up.to(w.codes.device))
        downs.append(down.to(w.codes.device))
    if w.up is not None:
        ups.append(w.up.float())
        downs.append(w.down.float())
    return replace(w, up=torch.cat(ups, 1), down=torch.cat(downs))
