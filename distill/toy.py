"""Toy teachers that are known exactly, so that every claim can be checked against the truth in seconds on a CPU."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from .denoiser import Cond, Denoiser
from .schedule import Schedule, expand, rand, randn


class Gaussian:
    """N(mean, std^2) in every coordinate, as a Denoiser. mean and std may be tensors that are still being trained."""

    def __init__(self, mean: Tensor | float, std: Tensor | float, schedule: Schedule):
        self.mean, self.std, self.schedule = mean, std, schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        alpha, sigma = expand(self.schedule.alpha(t), x_t), expand(self.schedule.sigma(t), x_t)
        return posterior_mean(x_t, alpha, sigma, self.mean, self.std)


class Mixture:
    """A mixture of K round Gaussians in D dimensions, as a Denoiser with the exact E[x0 | x_t].

    cond {"mode": (B,)} names the component of each sample; -1 (the null prompt) and cond None mean all of them.
    """

    def __init__(self, means: Tensor, std: float, schedule: Schedule, weights: Tensor | None = None):
        self.means, self.std, self.schedule = means, std, schedule  # means: K, D
        self.weights = torch.full((len(means),), 1 / len(means)) if weights is None else weights

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        alpha, sigma = self.schedule.alpha(t)[:, None, None], self.schedule.sigma(t)[:, None, None]
        x = x_t[:, None]  # B, 1, D
        per_mode = posterior_mean(x, alpha, sigma, self.means, self.std)  # B, K, D
        return (self.responsibilities(x, alpha, sigma, cond)[..., None] * per_mode).sum(1)

    def responsibilities(self, x: Tensor, alpha: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """p(mode | x_t): (B, K)."""
        var = (alpha * self.std) ** 2 + sigma**2  # B, 1, 1
        logits = self.weights.log() - ((x - alpha * self.means) ** 2 / var).sum(-1) / 2
        if cond is not None:
            mode = cond["mode"][:, None]
            other = (mode >= 0) & (mode != torch.arange(len(self.means), device=mode.device))
            logits = logits.masked_fill(other, -torch.inf)
        return logits.softmax(-1)

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """n points of the mixture, (n, D)."""
        mode = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        return self.means[mode] + self.std * randn((n, self.means.shape[1]), generator)


def ring(k: int = 8, radius: float = 1.0) -> Tensor:
    """K means on a circle: (K, 2)."""
    angle = torch.arange(k) * (2 * torch.pi / k)
    return radius * torch.stack([angle.cos(), angle.sin()], dim=1)


def posterior_mean(x_t: Tensor, alpha: Tensor, sigma: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    """E[x0 | x_t] for x0 ~ N(mean, std^2) and x_t = alpha x0 + sigma eps."""
    return mean + alpha * std**2 / ((alpha * std) ** 2 + sigma**2) * (x_t - alpha * mean)


class MLP(nn.Module):
    """A small net(x, index, cond) -> raw for points in D dimensions; index / `scale` should lie in about [0, 1].

    waves: how many random waves of x it sees beside x: with them it learns steep places sooner
    (Fourier features, Tancik et al. 2020, 2006.10739).
    """

    def __init__(
        self, dim: int = 2, hidden: int = 64, scale: float = 1000.0, generator: Generator | None = None, waves: int = 0
    ):
        super().__init__()
        self.scale = scale
        seen = dim + 3 + 2 * waves
        self.layers = nn.Sequential(
            nn.Linear(seen, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, dim)
        )
        with torch.no_grad():
            for p in self.parameters():  # as nn.Linear does, but from the given generator
                bound = (p.shape[-1] if p.ndim > 1 else hidden) ** -0.5
                p.copy_((2 * rand(p.shape, generator) - 1) * bound)
        self.register_buffer("waves", 2 * randn((dim, waves), generator))  # about 3 long

    def forward(self, x: Tensor, index: Tensor, cond: Cond = None) -> Tensor:
        """x (B, D), index (B,) -> (B, D)."""
        t = (index / self.scale)[:, None].to(x)
        phase = x @ self.waves
        return self.layers(torch.cat([x, t, (3 * t).cos(), (3 * t).sin(), phase.cos(), phase.sin()], dim=1))


class Student(nn.Module):
    """x = z + net(z): a one-step generator of points (B, D), whose first samples are the noise itself."""

    def __init__(self, dim: int = 2, hidden: int = 64, generator: Generator | None = None, waves: int = 0):
        super().__init__()
        self.net = MLP(dim, hidden, generator=generator, waves=waves)

    def forward(self, z: Tensor, cond: Cond = None) -> Tensor:
        """z (B, D) -> x0 (B, D)."""
        return z + self.net(z, torch.full((len(z),), self.net.scale))


class Coach:
    """A coach beside an exact teacher: teacher + net; the net is zero at first, so the coach starts as the teacher."""

    def __init__(
        self, teacher: Denoiser, dim: int = 2, hidden: int = 64, generator: Generator | None = None, waves: int = 0
    ):
        self.teacher, self.module, self.denoiser = teacher, MLP(dim, hidden, generator=generator, waves=waves), self
        self.schedule = teacher.schedule
        nn.init.zeros_(self.module.layers[-1].weight), nn.init.zeros_(self.module.layers[-1].bias)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        return self.teacher(x_t, t, cond) + self.module(x_t, self.schedule.index(t))

    def parameters(self) -> list[nn.Parameter]:
        """The net's."""
        return list(self.module.parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """The net's."""
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Into the net."""
        self.module.load_state_dict(state)
