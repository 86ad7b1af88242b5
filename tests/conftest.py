"""Fixtures shared by all tests."""

import pytest
import tiny


@pytest.fixture(scope="session")
def mods():
    """A tiny random model of the tutorial's architecture, as modules. Do not change its weights."""
    return tiny.modules()
