"""Plain functions of features, checked against closed forms."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor


class Gaussian(NamedTuple):
    """What the Frechet distance sees of a set of features."""

    mean: Tensor  # (D,)
    cov: Tensor  # (D, D)


def gaussian(features: Tensor) -> Gaussian:
    """Mean and covariance (divided by N - 1) of features (N, D), in float64."""
    features = features.double()
    return Gaussian(features.mean(0), features.T.cov())


def frechet(a: Tensor | Gaussian, b: Tensor | Gaussian) -> float:
    """Frechet distance between Gaussians, or those fitted to features (N, D) and (M, D) (Heusel et al. 2017, eq. 6).

    The trace of the root of the product is taken from the eigenvalues of a symmetric matrix similar to it. The value
    falls with the number of samples: compare only equal N, and give the distance between two real sets beside it.
    """
    (ma, ca), (mb, cb) = (g if isinstance(g, Gaussian) else gaussian(g) for g in (a, b))
    values, vectors = torch.linalg.eigh(ca)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cb @ root).clamp(min=0).sqrt().sum()
    return ((ma - mb).square().sum() + ca.trace() + cb.trace() - 2 * cross).item()


def kid(a: Tensor, b: Tensor, generator: Generator, subsets: int = 100, size: int = 1000) -> tuple[float, float]:
    """Squared maximum mean discrepancy of features a (N, D) and b (M, D), unbiased, with the kernel (x y / D + 1)^3
    (Binkowski et al. 2018, section 4); mean and standard deviation over random subsets of at most `size` of each."""
    a, b = a.double(), b.double()
    size = min(size, len(a), len(b))

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def off_diagonal(k: Tensor) -> Tensor:
        return (k.sum() - k.trace()) / (size * (size - 1))

    values = []
    for _ in range(subsets):
        x, y = (f[torch.randperm(len(f), generator=generator)[:size]] for f in (a, b))
        values.append(off_diagonal(kernel(x, x)) + off_diagonal(kernel(y, y)) - 2 * kernel(x, y).mean())
    found = torch.stack(values)
    return found.mean().item(), found.std(correction=0).item()


def clip_score(pictures: Tensor, texts: Tensor) -> float:
    """100 max(cos, 0) between CLIP's features of pictures (N, D) and of their prompts (N, D), the mean (Hessel et al.
    2021, eq. 1, without the factor 2.5; as torchmetrics)."""
    return (100 * torch.cosine_similarity(pictures.double(), texts.double()).clamp(min=0)).mean().item()


def diversity(features: Tensor, groups: int) -> float:
    """1 - cos between features of two pictures of one prompt, the mean over pairs and prompts: 0 where a prompt gives
    the same picture every time. features (groups * k, D), a group's rows together."""
    unit = torch.nn.functional.normalize(features.double(), dim=1).view(groups, -1, features.shape[-1])
    cosines, k = unit @ unit.mT, unit.shape[1]
    return (1 - (cosines.sum((1, 2)) - k) / (k * (k - 1))).mean().item()
