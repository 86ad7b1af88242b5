"""ComfyUI's model management for quantized weights: LoRA, hooks, offloading and saving without unpacking the model.

The static patcher is the base on purpose: the dynamic one quantizes patched weights again, which loses the patch. Here
a quantized layer never has its weight replaced. It is handed the patches instead (`set_patches`) and applies them when
it is called, so unpatching is forgetting them, and the output afterwards is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature

import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import LowVramPatch, ModelPatcher

from .ops import Quantized

STATIC = {"disable_dynamic": True} if "disable_dynamic" in signature(comfy.sd.CLIP.__init__).parameters else {}
"""What asks `comfy.sd.CLIP` for the static patcher; ComfyUI 0.12 has no word for it."""


class Patcher(ModelPatcher):
    @classmethod
    def adopt(cls, patcher: ModelPatcher) -> Patcher:
        """A stock static patcher becomes one of these. (CLIP makes its own patcher and offers no way to choose.)"""
        if type(patcher) is not ModelPatcher:
            raise TypeError(f"{type(patcher).__name__} cannot hold quantized weights: load it with disable_dynamic")
        patcher.__class__ = cls
        return patcher

    def quantized(self) -> Iterator[tuple[str, Quantized]]:
        """(key of its weight, layer) of each layer that is quantized."""
        for name, m in self.model.named_modules():
            if isinstance(m, Quantized) and m.is_quantized:
                yield f"{name}.weight", m

    def layer(self, key: str) -> Quantized | None:
        """The quantized layer that a key of the state dict belongs to."""
        name, _, _ = key.rpartition(".")
        try:
            m = comfy.utils.get_attr(self.model, name) if name else None
        except AttributeError:
            return None
        return m if isinstance(m, Quantized) and m.is_quantized else None

    # ------------------------------------------------------------------------------------------ patches

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        """Codes and scales are in the state dict, but only what looks like a weight or a bias takes patches."""
        patches = {k: v for k, v in patches.items() if not self._inner(k if isinstance(k, str) else k[0])}
        return super().add_patches(patches, strength_patch, strength_model)

    def add_hook_patches(self, hook, patches, strength_patch=1.0, strength_model=1.0):
        patches = {k: v for k, v in patches.items() if not self._inner(k if isinstance(k, str) else k[0])}
        return super().add_hook_patches(hook, patches, strength_patch, strength_model)

    def model_state_dict(self, filter_prefix=None):
        """For whoever reads or merges weights: they look dense, and become dense one at a time when computed with."""
        sd = super().model_state_dict(filter_prefix)
        outer = {k: t for k, t in sd.items() if not self._inner(k)}
        return outer | {k: layer.weight for k, layer in self.quantized() if k in outer}

    def _inner(self, key: str) -> bool:
        return key.rpartition(".")[2] not in ("weight", "bias") and self.layer(key) is not None

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False, return_weight=False, **newer):
        layer = self.layer(key) if key.endswith(".weight") else None
        if layer is None:
            return super().patch_weight_to_device(key, device_to, inplace_update, return_weight, **newer)
        if return_weight:  # somebody wants the dense weight with its patches
            return layer.patched_weight(self.patches.get(key, []), device_to or layer.weight.device, torch.float32)
        return None  # `hand_over` has it

    def hand_over(self) -> None:
        """Give each quantized layer its patches, in place of the functions ComfyUI puts on layers it leaves behind."""
        for key, layer in self.quantized():
            layer.weight_function = [f for f in layer.weight_function if not isinstance(f, LowVramPatch)]
            layer.set_patches(key, self.patches.get(key, []))

    def load(self, *args, **kwargs):
        super().load(*args, **kwargs)
        self.hand_over()

    def partially_unload(self, *args, **kwargs):
        freed = super().partially_unload(*args, **kwargs)
        self.hand_over()
        return freed

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            for key, layer in self.quantized():
                layer.set_patches(key, [])

    def _load_list(self, *args, **kwargs):
        """What ComfyUI decides by, for each layer: (bytes to reserve where it is left behind, its bytes, name, ...).

        For a patched weight ComfyUI reserves room for two dense ones; here what travels is packed, LoRA included.
        """
        found = super()._load_list(*args, **kwargs)
        return [(self._travels(*entry), *entry[1:]) if len(entry) == 5 else entry for entry in found]

    def _travels(self, reserve: int, size: int, name: str, m, params) -> int:
        packed = isinstance(m, Quantized) and m.is_quantized
        return size if packed and m.is_low_rank(self.patches.get(f"{name}.weight", [])) else reserve

    def pin_weight_to_device(self, key):
        if self.layer(key) is None:
            super().pin_weight_to_device(key)

    # ------------------------------------------------------------------------------------------ hooks

    def patch_hooks(self, hooks):
        """Hooks patch weights during part of the sampling."""
        super().patch_hooks(hooks)
        patches = self.get_combined_hook_patches(hooks) if hooks is not None else {}
        for key, layer in self.quantized():
            layer.set_hook_patches(patches.get(key, []))

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, original_weights, memory_counter):
        if not key.endswith(".weight") or self.layer(key) is None:
            super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)

    def unpatch_hooks(self, whitelist_keys_set=None):
        super().unpatch_hooks(whitelist_keys_set)
        for key, layer in self.quantized():
            if not whitelist_keys_set or key in whitelist_keys_set:
                layer.set_hook_patches([])

    # ------------------------------------------------------------------------------------------ saving

    def state_dict_for_saving(self, clip_state_dict=None, vae_state_dict=None, clip_vision_state_dict=None):
        """As ComfyUI from 0.22 on; older ones do not ask for what is below, and 0.12.0 leaves CLIP and VAE out."""
        unet = self.model_state_dict_for_saving(self.model.diffusion_model, "diffusion_model.")
        return self.model.state_dict_for_saving(unet, clip_state_dict, vae_state_dict, clip_vision_state_dict)

    def _dense_for_saving(self) -> dict:
        """What ComfyUI before 0.22 makes of the diffusion model, caught where it hands it on."""
        self.model.state_dict_for_saving = lambda sd, *_, **__: sd
        try:
            return super().state_dict_for_saving()
        finally:
            del self.model.state_dict_for_saving

    def model_state_dict_for_saving(self, model=None, prefix=""):
        """Quantized layers as a file holds them: LoRA in the low-rank branch, dense where other patches are."""
        stock = getattr(super(), "model_state_dict_for_saving", None)
        sd = stock(model, prefix) if stock else self._dense_for_saving()
        for key, layer in self.quantized():
            if not key.startswith(prefix):
                continue
            name = key[len(prefix) : -len(".weight")]
            for k in [k for k in sd if k.rpartition(".")[0] == name and not k.endswith(".bias")]:
                del sd[k]
            sd |= {k: t.cpu() for k, t in layer.saved(name, self.patches.get(key, [])).items()}
        return sd
