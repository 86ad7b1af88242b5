import pytest

from distill.quant import choose, kernels, remember


@pytest.fixture
def small_cases_count(monkeypatch):
    """Tests use layers that are below what integers are worth; and nothing chosen in one test serves another."""
    monkeypatch.setattr(kernels, "WORTH", 0)
    monkeypatch.setattr(choose, "integers_are_fast", lambda: True)
    monkeypatch.setattr(remember, "SMALL", 0)
    choose.forget()
    yield
    choose.forget()
