"""Fixtures shared by all tests."""

import signal

import pytest
import tiny


@pytest.fixture(scope="session")
def mods():
    """A tiny random model of the tutorial's architecture, as modules. Do not change its weights."""
    return tiny.modules()


@pytest.fixture(autouse=True, scope="session")
def _hears_ctrl_c():
    """A shell starts what runs in its background deaf to Ctrl-C, and so all that tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
