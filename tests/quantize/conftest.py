"""Every test here begins with the same global random state, which torch initialises modules from."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
