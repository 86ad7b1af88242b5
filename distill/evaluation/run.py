"""A model's figures on prompts and real pictures of one's own, with the protocol that they were made by."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from ..backbones.base import Backbone
from ..backbones.drawing import to_pil
from ..bench import machine
from ..methods.base import Told
from ..training.batches import PICTURES
from .extractors import Clip, Inception, digest
from .figures import Gaussian, clip_score, diversity, frechet, gaussian, kid

GROUPS, PER_GROUP = 16, 8
"""Diversity: so many prompts, and pictures of each."""
KID = "polynomial kernel, degree 3; 100 subsets of at most 1000"


@dataclass(frozen=True)
class Reference:
    """Real pictures as Inception sees them. features: None where only the Gaussian is known, and KID is not."""

    gaussian: Gaussian
    features: Tensor | None
    about: dict[str, Any]


def reference(path: Path, inception: Inception, batch: int, told: Told) -> Reference:
    """Of a folder of pictures, or of an .npz with mu and sigma as pytorch-fid and clean-fid write it.

    Raises ValueError where there are none, or fewer than two.
    """
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as held:
                found = Gaussian(*(torch.from_numpy(held[name]).double() for name in ("mu", "sigma")))
        except (OSError, ValueError, KeyError) as e:
            raise ValueError(f"{path}: no mu and sigma in it ({e}): name a folder of real pictures") from None
        return Reference(found, None, {"name": path.name, "sha256": digest(path)})
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURES)
    if len(files) < 2:
        raise ValueError(f"{path}: {len(files)} pictures in it: two or more are needed, thousands are usual")
    rows = []
    for i in range(0, len(files), batch):
        rows.append(inception([_opened(f) for f in files[i : i + batch]]))
        told("real pictures", min(1.0, (i + batch) / len(files)))
    features = torch.cat(rows)
    total = hashlib.sha256(features.numpy().tobytes()).hexdigest()
    return Reference(gaussian(features), features, {"name": path.name, "n": len(files), "sha256": total})


def _opened(file: Path) -> Image.Image:
    with Image.open(file) as picture:
        return picture.convert("RGB")


@dataclass
class Measure:
    """What is measured: the extractors that are there decide. how: steps and guidance, as for Backbone.sample."""

    model: Backbone
    prompts: list[str]
    inception: Inception | None = None
    clip: Clip | None = None
    real: Reference | None = None
    n: int = 1024
    seed: int = 1234
    batch: int = 8
    told: Told = lambda what, share: None

    def run(self, **how: Any) -> dict[str, Any]:
        """Figures and protocol; n pictures of the prompts in turn, and GROUPS x PER_GROUP for diversity."""
        asked = [self.prompts[i % len(self.prompts)] for i in range(self.n)]
        groups = min(GROUPS, len(self.prompts))
        repeated = [p for p in self.prompts[:groups] for _ in range(PER_GROUP)]
        seconds: list[float] = []
        seen, looked, read = [], [], []
        generator = Generator().manual_seed(self.seed)
        for some, pictures in self.draw(asked, "pictures", generator, seconds, how):
            if self.inception:
                seen.append(self.inception(pictures))
            if self.clip:
                looked.append(self.clip.pictures(pictures))
                read.append(self.clip.texts(some))
        look = self.clip.pictures if self.clip else self.inception
        varied = [look(p) for _, p in self.draw(repeated, "diversity", generator, [], how)] if look else []
        figures: dict[str, Any] = {"n": self.n}
        if seen and self.real:
            features = torch.cat(seen)
            figures["fid"] = frechet(features, self.real.gaussian)
            if self.real.features is not None:
                draw = Generator().manual_seed(self.seed)
                figures["kid"], figures["kid_std"] = kid(features, self.real.features, draw)
        if looked:
            figures["clip_score"] = clip_score(torch.cat(looked), torch.cat(read))
        if varied:
            figures["diversity"] = diversity(torch.cat(varied), groups)
        figures["seconds_per_picture"] = float(np.median(seconds))
        return {"figures": figures, "protocol": self.protocol(groups, how)}

    def draw(
        self, prompts: list[str], what: str, generator: Generator, seconds: list[float], how: dict[str, Any]
    ) -> Iterator[tuple[list[str], list[Image.Image]]]:
        """(prompts, pictures) batch by batch; seconds gets those of each picture, the first batch left out as warm-up
        where there is another."""
        for i in range(0, len(prompts), self.batch):
            some = prompts[i : i + self.batch]
            start = time.perf_counter()
            images = self.model.sample(some, generator, batch=self.batch, **how).cpu()  # .cpu() waits for the device
            if i == self.batch:
                seconds.clear()
            seconds += [(time.perf_counter() - start) / len(some)] * len(some)
            self.told(what, min(1.0, (i + len(some)) / len(prompts)))
            yield some, to_pil(images)

    def protocol(self, groups: int, how: dict[str, Any]) -> dict[str, Any]:
        """What another person needs to make the same figures again."""
        m = self.model
        steps = how.get("steps") or m.meta.steps
        scale = m.meta.guidance.get("scale") if how.get("guidance") is None else how["guidance"]
        baked = bool(m.meta.guidance.get("baked"))
        net = next(m.net.parameters())
        by = "CLIP" if self.clip else "Inception" if self.inception else None
        return {
            "model": m.name,
            "sampler": {"steps": steps, "solver": "its own" if baked else "dpm++", "guidance": scale, "baked": baked},
            "size": m.shape(1)[-1] * m.meta.latent["factor"],
            "prompts": {"count": len(self.prompts), "sha256": _hash(self.prompts), "order": "in turn, from the first"},
            "noise": {"seed": self.seed, "generator": "torch, CPU, one after the other", "batch": self.batch},
            "inception": {"resize": self.inception.protocol, "file": self.inception.about} if self.inception else None,
            "reference": self.real.about if self.real else None,
            "kid": None if not self.real or self.real.features is None else KID,
            "clip": {"how": self.clip.protocol, "folder": self.clip.about} if self.clip else None,
            "diversity": f"1 - cos of {by} features, {groups} x {PER_GROUP} pictures" if by else None,
            "time": machine(m.device) | {"dtype": str(net.dtype), "median over": "batches but the first"},
        }


def _hash(prompts: list[str]) -> str:
    return hashlib.sha256("\n".join(prompts).encode("utf-8", "surrogatepass")).hexdigest()
