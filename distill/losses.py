"""Losses, written once, in x0. Pure functions of (B, ...) tensors; nothing here knows a network or a method.

Every difference of two nets' predictions at the same (x_t, t) is a multiple of the difference of their x0:
eps_T - eps_C = (alpha/sigma)(x0_C - x0_T), u_T - u_C = (x0_C - x0_T)/sigma for flow. So the methods differ by a weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Weight = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (x, x0_T, alpha, sigma) -> broadcastable to x

# ---------------------------------------------------------------------------------------- the student's losses


def one(x: Tensor, x0_T: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Diff-Instruct (Luo et al. 2023): the plain difference."""
    return torch.ones_like(alpha)


def swiftbrush(x: Tensor, x0_T: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """sigma^2 on the eps difference (SwiftBrush, Nguyen & Tran 2023; ProlificDreamer) = alpha sigma on x0."""
    return alpha * sigma


def dmd(x: Tensor, x0_T: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """1 / mean|x - x0_T| per sample (DMD, Yin et al. 2023, eq. 8; DMD2 and TDM likewise); 1e-6 as in FastGen."""
    return 1 / (sample_mean((x - x0_T).abs()) + 1e-6)


WEIGHTS: dict[str, Weight] = {
    "dmd": dmd,
    "tdm": dmd,
    "swiftbrush": swiftbrush,
    "prolificdreamer": swiftbrush,
    "diff_instruct": one,
    "one": one,
}


def matching_gradient(x0_T: Tensor, x0_C: Tensor, weight: Tensor) -> Tensor:
    """w (x0_C - x0_T): where the student's samples should not go; 0 where it is not a number."""
    return (weight * (x0_C.float() - x0_T.float())).nan_to_num(0.0, 0.0, 0.0)


def surrogate(x: Tensor, g: Tensor) -> Tensor:
    """A scalar whose gradient by x is g / x.numel(). Its value is |g|^2/2 and says nothing about quality."""
    return 0.5 * (x - (x - g).detach()).square().mean()


def regression(x: Tensor, target: Tensor) -> Tensor:
    """Root-mean-square error of each sample, averaged: unlike the square, far-off samples do not drown the rest."""
    per_sample = x[0].numel() ** 0.5
    return (torch.linalg.vector_norm((x - target).flatten(1), dim=1) / per_sample).mean()


# ------------------------------------------------------------------------------------------- the coach's losses

COACH_WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # (alpha, sigma) -> weight on |x0_hat - x0|^2
    "one": lambda alpha, sigma: torch.ones_like(sigma),  # FastGen, x0 space
    "eps": lambda alpha, sigma: (alpha / sigma) ** 2,  # plain eps-MSE (DMD2, DDPM)
    "swiftbrush": lambda alpha, sigma: alpha**4 / sigma**2,  # alpha^2 on eps-MSE: less at the noisy end
    "edm": lambda alpha, sigma: (alpha / sigma) ** 2 + 4,  # EDM: 1/s^2 + 1/sigma_data^2, sigma_data 1/2
    "clamped": lambda alpha, sigma: (1 + (alpha / sigma) ** 2).clamp(max=5),  # 1 + SNR, at most 5 (Min-SNR-5)
}


def denoising(x0_hat: Tensor, x0: Tensor, weight: Tensor) -> Tensor:
    """mean over the batch of w(t) |x0_hat - x0|^2; w is broadcastable to x0."""
    return (weight * (x0_hat.float() - x0.float()).square()).mean()


# ------------------------------------------------------------------------------------------- coach-health readouts


def sample_mean(x: Tensor) -> Tensor:
    """(B, ...) -> (B, 1, ...)"""
    return x.mean(dim=tuple(range(1, x.ndim)), keepdim=True)


def health(x: Tensor, x0_T: Tensor, x0_C: Tensor) -> dict[str, Tensor]:
    """rel_gap: mean|x0_C - x0_T| / mean|x - x0_T|, 0 while the coach still is the teacher, 1 when it knows no more
    than SDS; cosine of the same two differences; x_mean, x_std: the samples, and x_mean_i, x_std_i per channel;
    x_drift: how far the samples' channel means are from the teacher's idea of the same samples, in standard deviations.
    """
    gap, pull = x0_C - x0_T, x - x0_T
    logs = {
        "rel_gap": gap.abs().mean() / pull.abs().mean().clamp(min=1e-12),
        "cosine": torch.nn.functional.cosine_similarity(gap.flatten(1), pull.flatten(1)).mean(),
        "x_mean": x.mean(),
        "x_std": x.std(),
    }
    channels = x.transpose(0, 1).flatten(1)  # C, B*H*W
    logs["x_drift"] = pull.transpose(0, 1).flatten(1).mean(1).abs().mean() / x.std().clamp(min=1e-12)
    for i, (mean, std) in enumerate(zip(channels.mean(1), channels.std(1))):
        logs |= {f"x_mean_{i}": mean, f"x_std_{i}": std}
    return {k: v.detach() for k, v in logs.items()}
