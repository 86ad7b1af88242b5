"""Nets for points in the plane."""

import torch

from distill.toy import MLP


def test_waves_learn_steep_places_sooner():
    """Eight flat steps around a circle, as a student has to draw eight blobs."""
    seeds = torch.Generator().manual_seed(0)
    x = torch.randn(512, 2, generator=seeds)
    step = (torch.atan2(x[:, 1], x[:, 0]) * 4 / torch.pi).round() * torch.pi / 4
    y = 2 * torch.stack([step.cos(), step.sin()], dim=1)
    error = {}
    for waves in (0, 32):
        net = MLP(generator=torch.Generator().manual_seed(1), waves=waves)
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        for _ in range(300):
            loss = (net(x, torch.zeros(512)) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        error[waves] = loss.item()
    assert error[32] < 0.5 * error[0], error
