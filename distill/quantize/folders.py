"""Folders of diffusers' and transformers' as something that runs: a pipeline whose U-Net or transformer is quantized,
and a text encoder by itself. Their weights are streamed from the file, so the model may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..backbones.skeleton import skeleton
from ..header import CheckpointError
from .options import Progress, Quantize
from .prompts import given_prompts
from .runnable import Runnable
from .source import Source, open_source, read_json
from .stream import stream
from .views import Renamed

STEPS, SAMPLES, TEXTS = 8, 4, 64


def open_folder(source: Source, options: Quantize) -> tuple[Runnable | None, str]:
    """A part's folder as something that runs, or None and why it cannot."""
    config = read_json(source.folder / "config.json")
    if "_class_name" not in config:
        return Text.open(source, options, config)
    index = source.folder.parent / "model_index.json"
    if not index.is_file():
        return None, f"data-free: {index} is not there, which tells how the model is run"
    return Pipeline.open(source, options, read_json(index))


def named(module: nn.Module, source: Source) -> dict[str, str]:
    """Parameter name -> key in the file. transformers renames (`text_model.` dropped or added) and ties (T5's
    embedding), so a name may also be the end of a key or a key the end of a name. Raises CheckpointError."""
    keys = set(source)
    found = {}
    for name in module.state_dict():
        ends = [k for k in keys if k.endswith("." + name) or name.endswith("." + k)]
        shared = [k for k in ("shared.weight",) if name.endswith("embed_tokens.weight") and k in keys]
        fit = [name] if name in keys else ends or shared
        if len(fit) != 1:
            raise CheckpointError(
                f"{source.path}: no weight for {name!r} of {type(module).__name__}. Save the model again."
            )
        found[name] = fit[0]
    return found


class Pipeline(Runnable):
    """A diffusers pipeline, run as its own code runs it: its scheduler, its guidance, fewer steps."""

    @classmethod
    def open(cls, source: Source, options: Quantize, index: dict) -> tuple[Pipeline | None, str]:
        """The pipeline around a part, its weights streamed; or None and why it cannot run."""
        import diffusers
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        root, part = source.folder.parent, source.folder.name
        kind = getattr(diffusers, str(index.get(part, ["", ""])[1]), None)
        if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
            return None, f"data-free: {root / 'model_index.json'} knows no {part} of diffusers'"
        net = skeleton(lambda: kind.from_config(kind.load_config(source.folder)))
        self = cls({"net": net}, {f"net.{n}": k for n, k in named(net, source).items()}, source)
        absent = [n for n in ("text_encoder_3", "tokenizer_3") if n in index and not (root / n).is_dir()]  # SD3's T5
        texts = {
            n: _text(root / n, index[n])
            for n in index
            if n.startswith("text_encoder") and index[n][0] and n not in absent
        }
        unwanted = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
        unwanted = {k: v for k, v in unwanted.items() if k in index} | dict.fromkeys(absent)
        if "safety_checker" in index:
            unwanted["requires_safety_checker"] = False
        self.pipe = diffusers.DiffusionPipeline.from_pretrained(
            root, **{part: net}, **texts, **unwanted, use_safetensors=True, local_files_only=True
        )
        for component in self.pipe.components.values():
            if isinstance(component, nn.Module):  # tells the pipeline that weights on the meta device run on the CPU
                add_hook_to_module(component, AlignDevicesHook(io_same_device=True, execution_device="cpu"))
        self.pipe.set_progress_bar_config(disable=True)
        self.prompts, said = given_prompts(options, options.samples or SAMPLES)
        self.steps, self.seed, self.calls, self.seen = options.steps or STEPS, options.seed, [], 0
        without = f" without {absent[0]}" if absent else ""
        return self, f"calibrated on {said} at {self.steps} steps of its pipeline{without}"

    def run(self, progress: Progress) -> None:
        """One prompt at a time; the calls of the first prompt's first, middle and last step are kept as probes."""
        total = len(self.prompts) * self.steps
        handle = self.modules["net"].register_forward_pre_hook(self._keep, with_kwargs=True)
        try:
            for i, prompt in enumerate(self.prompts):

                def tell(pipe: object, step: int, t: Tensor, kwargs: dict, first: int = i * self.steps) -> dict:
                    progress(first + step + 1, total, "calibrating")
                    return kwargs

                generator = torch.Generator().manual_seed(self.seed + i)
                how = {"num_inference_steps": self.steps, "output_type": "latent", "generator": generator}
                self.pipe(prompt, **how, callback_on_step_end=tell)
        finally:
            handle.remove()

    def _keep(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.seen in {0, self.steps // 2, self.steps - 1}:
            self.calls.append((args, kwargs))
        self.seen += 1

    def outputs(self) -> Tensor:
        """The net's outputs on the calls that were kept, one after the other."""
        found = [self.modules["net"](*args, **kwargs) for args, kwargs in self.calls]
        return torch.cat([(y[0] if isinstance(y, tuple) else y.sample).flatten() for y in found])


class Text(Runnable):
    """A text encoder of transformers', with the tokenizer in its folder or in the one beside it."""

    @classmethod
    def open(cls, source: Source, options: Quantize, config: dict) -> tuple[Text | None, str]:
        """The encoder and its tokenizer; or None and why it cannot run."""
        import transformers

        places = (source.folder, source.folder.parent / source.folder.name.replace("text_encoder", "tokenizer"))
        place = next((p for p in places if (p / "tokenizer_config.json").is_file()), None)
        if place is None:
            return None, f"data-free: no tokenizer in {places[0]} or {places[1]}"
        kind = (config.get("architectures") or [""])[0]
        net = _skeleton_of(source.folder, kind)
        if net is None:
            return None, f"data-free: transformers has no text encoder called {kind!r}"
        self = cls({"net": net}, {f"net.{n}": k for n, k in named(net, source).items()}, source)
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, local_files_only=True)
        self.prompts, said = given_prompts(options, options.samples or TEXTS)
        length = min(tokenizer.model_max_length, 77)
        self.tokens = tokenizer(
            self.prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        return self, f"calibrated on {said}"

    def run(self, progress: Progress) -> None:
        """Encode all prompts."""
        for i in range(0, len(self.prompts), 8):
            progress(i, len(self.prompts), "calibrating")
            self._encode(slice(i, i + 8))
        progress(len(self.prompts), len(self.prompts), "calibrating")

    def _encode(self, rows: slice) -> Tensor:
        ids, mask = self.tokens.input_ids[rows], self.tokens.attention_mask[rows]
        return self.modules["net"](input_ids=ids, attention_mask=mask).last_hidden_state

    def outputs(self) -> Tensor:
        """The first prompts' states."""
        return self._encode(slice(0, 8))


def _text(folder: Path, which: list[str]) -> nn.Module:
    """A pipeline's text encoder, streamed."""
    net = _skeleton_of(folder, which[1])
    if which[0] != "transformers" or net is None:
        raise CheckpointError(f"{folder}: a text encoder of {which}, which is not transformers'. Use --no-calibrate.")
    source = open_source(folder)
    stream(net, Renamed(source, named(net, source)))
    return net


def _skeleton_of(folder: Path, kind: str) -> nn.Module | None:
    import transformers

    cls: Callable | None = getattr(transformers, kind, None) if kind.isidentifier() else None
    if cls is None or not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        return None
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return skeleton(lambda: cls(config))
