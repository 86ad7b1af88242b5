"""Which models can be run to calibrate them."""

from __future__ import annotations

from .options import Prompts, Quantize
from .runnable import Runnable
from .source import Source


def open_runnable(
    source: Source, options: Quantize, parts: tuple[str, ...], prompts: Prompts | None = None
) -> tuple[Runnable | None, str]:
    """The source as something that runs, and what it is calibrated on; or None and why it cannot be run."""
    if not source.is_onestep and source.folder is None:
        return None, "data-free: a single file does not say how it is run (give its diffusers folder to calibrate)"
    try:
        import accelerate  # noqa: F401
        import diffusers  # noqa: F401
    except ImportError as e:
        return None, f"data-free: running it needs {e.name} (pip install onestep[distill])"
    if source.is_onestep:
        from .onestep import OneStep

        return OneStep.open(source, options, parts, prompts)
    from .folders import open_folder

    return open_folder(source, options)
