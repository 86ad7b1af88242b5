"""Linear and Conv2d that hold and compute on a quantized weight.

`QuantizedLayer` is a mixin in front of any nn.Linear or nn.Conv2d, ComfyUI's included: a layer that is marked in the
state dict loads as quantized, any other as its class always did. The tensors are buffers with the names and shapes of
the file contract, so `state_dict()` is what the file holds, `.to(device)` and deepcopy work, and what ComfyUI counts
is the packed size. No dense copy outlives a call.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from . import dispatch
from .weight import FORMATS, MARK, SUFFIXES, QuantError, QuantizedWeight, layers, read_mark

ACTIVATIONS = ("auto", "float", "int8")


class QuantizedLayer:
    """Mixin for nn.Linear and nn.Conv2d: `class QuantLinear(QuantizedLayer, nn.Linear)`. Needs no __init__."""

    activations: str = "auto"
    """auto: int8 where `dispatch.integer_weight` says so; float: never; int8: wherever an integer kernel exists"""
    _spec: dict | None = None  # the fields of QuantizedWeight that are no tensors

    @property
    def is_quantized(self) -> bool:
        """Whether it holds codes rather than a dense weight."""
        return self._spec is not None

    def set_quantized(self, w: QuantizedWeight) -> None:
        """Compute on w from now on; a dense weight is dropped. Raises QuantError where w is not this layer's shape."""
        self._check(w)
        for name in ("weight", *SUFFIXES.values(), MARK):
            self._parameters.pop(name, None)
            self._buffers.pop(name, None)
        for field, suffix in SUFFIXES.items():
            t = getattr(w, field)
            if t is not None:
                self.register_buffer(suffix, t)
        self.register_buffer(MARK, w.to_tensors("")[f".{MARK}"])
        self._spec = {name: getattr(w, name) for name in ("shape", "bits", "int8_activations", "flat")}

    def get_quantized(self) -> QuantizedWeight:
        """The layer's tensors as they are."""
        return QuantizedWeight(**{f: self._buffers.get(s) for f, s in SUFFIXES.items()}, **self._spec)

    def quantized_forward(self, x: Tensor) -> Tensor:
        """The layer's output, bias included."""
        w = self.get_quantized()
        if w.codes.device != x.device:  # offloaded: only the packed tensors travel
            w = w.to(x.device)
        bias = self.bias
        if bias is not None and (bias.device != x.device or bias.dtype != x.dtype):
            bias = bias.to(x.device, x.dtype)
        return self._compute(w, x, bias)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """As the dense layer's; computes on the packed weight."""
        return self.quantized_forward(x) if self.is_quantized else super().forward(x, *args, **kwargs)

    def _compute(self, w: QuantizedWeight, x: Tensor, bias: Tensor | None) -> Tensor:
        if len(w.shape) == 2:
            return dispatch.linear(w, x, bias, self.activations)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return dispatch.conv2d(w, x, bias, *geometry, self.activations)

    def _check(self, w: QuantizedWeight) -> None:
        if isinstance(self, nn.Conv2d):
            shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
            if self.padding_mode != "zeros":
                raise QuantError(f"padding_mode {self.padding_mode!r} of a quantized convolution. Keep it dense.")
        else:
            shape = (self.out_features, self.in_features)
        if tuple(w.shape) != shape:
            raise QuantError(f"a quantized weight of shape {tuple(w.shape)} where the layer's is {shape}.")

    # ------------------------------------------------------------------------------------------ torch's machinery

    def _apply(self, fn, recurse: bool = True):
        """`.to(device)` moves everything; `.half()` and `.to(dtype)` leave scales what they are in the file."""
        if not self.is_quantized:
            return super()._apply(fn, recurse)
        kept = {s: self._buffers.pop(s) for s in SUFFIXES.values() if s in self._buffers}
        super()._apply(fn, recurse)
        for suffix, t in kept.items():
            moved = fn(t)
            moved = moved if moved.dtype == t.dtype else t.to(moved.device)
            self._buffers[suffix] = moved
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        name = prefix[:-1] or type(self).__name__
        own = {f"{name}.{k[len(prefix) :]}": v for k, v in state_dict.items() if k.startswith(prefix)}
        ours = f"{name}.{MARK}" in own and read_mark(own, name)["format"] in FORMATS
        if not ours and not self.is_quantized:
            return super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing, unexpected, errors
            )
        try:
            if ours:
                self._load_quantized(own, name, bool(local_metadata.get("assign_to_params_buffers")))
            elif f"{name}.weight" in own:
                raise QuantError("quantized here, dense in the state dict")
            else:
                missing.append(prefix + "weight")
        except QuantError as e:
            errors.append(str(e) if name in str(e) else f"layer {name}: {e}")
        if self.bias is not None and f"{name}.bias" not in own:
            missing.append(prefix + "bias")
        known = {*SUFFIXES.values(), "weight_zeros", MARK, *(["bias"] if self.bias is not None else [])}
        unexpected += [k for k in state_dict if k.startswith(prefix) and k[len(prefix) :] not in known]

    def _load_quantized(self, own: Mapping[str, Tensor], name: str, assign: bool) -> None:
        w = QuantizedWeight.from_tensors(own, name)
        here = next(
            (t.device for t in (self._buffers.get("weight"), self._parameters.get("weight")) if t is not None), None
        )
        w = w if here is None or here.type == "meta" else w.to(here)
        if not assign:
            w = QuantizedWeight(**(vars(w) | {f: t.clone() for f, t in w.fields().items()}))
        self.set_quantized(w)
        bias = own.get(f"{name}.bias")
        if bias is not None and self.bias is not None:
            if tuple(bias.shape) != (w.out_features,):
                raise QuantError(f"layer {name}: bias is {tuple(bias.shape)}, not {(w.out_features,)}")
            bias = bias if assign else bias.clone()
            self.bias = nn.Parameter(bias.to(w.codes.device), requires_grad=False)


class QuantLinear(QuantizedLayer, nn.Linear):
    """nn.Linear on a quantized weight."""


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """nn.Conv2d on a quantized weight."""


def install(model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Replace the layers of `model` (real or on the meta device) that state_dict marks by quantized ones, loaded.

    Returns the other entries under `prefix`, without it: `model.load_state_dict(rest, strict=False, assign=True)`.
    Raises QuantError naming a layer that the model lacks, that is neither Linear nor Conv2d, or of another shape.
    """
    own = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
    modules = dict(model.named_modules())
    used = set()
    for name in layers(own):
        new = _like(name, modules.get(name))
        entries = {k: own[k] for s in (*SUFFIXES.values(), "weight_zeros", MARK, "bias") if (k := f"{name}.{s}") in own}
        try:
            new.load_state_dict({k[len(name) + 1 :]: v for k, v in entries.items()}, assign=True)
        except RuntimeError as e:  # torch's list of what layers said
            problem = str(e).splitlines()[-1].strip().replace(f"layer {type(new).__name__}", f"layer {name}")
            raise QuantError(problem) from None
        used |= entries.keys()
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, new)
    return {k: v for k, v in own.items() if k not in used}


def _like(name: str, module: nn.Module | None) -> QuantizedLayer:
    """An empty quantized layer with the geometry of `module`."""
    if isinstance(module, nn.Linear):
        new = QuantLinear(module.in_features, module.out_features, module.bias is not None, device="meta")
    elif isinstance(module, nn.Conv2d):
        new = QuantConv2d(
            module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding,
            module.dilation, module.groups, module.bias is not None, module.padding_mode, device="meta",
        )  # fmt: skip
    else:
        raise QuantError(
            f"layer {name}: quantized in the file, {'missing' if module is None else type(module).__name__} in the "
            f"model. The file belongs to another model."
        )
    return new.train(module.training)
