import pytest

from distill.packed import cache, dispatch, verify


@pytest.fixture
def small_cases_count(monkeypatch):
    """Tests use layers that are below what integers are worth; and nothing chosen in one test serves another."""
    monkeypatch.setattr(dispatch, "WORTH", 0)
    monkeypatch.setattr(verify, "integers_are_fast", lambda: True)
    monkeypatch.setattr(cache, "SMALL", 0)
    verify.forget()
    yield
    verify.forget()
