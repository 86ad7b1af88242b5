"""The timesteps a family of models is called at, by rules that follow from the number of steps.

Each rule takes (steps, schedule specification) and gives timesteps as the net counts them, falling: 0..999 of a DDPM
schedule, 1000 tau of a flow. tests/recipes hold them to diffusers' schedulers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Rule = Callable[[int, dict[str, Any]], list[float]]
CONSISTENCY = 50
"""timesteps that LCM and TCD were distilled on (both papers): every 20th of 1000"""
ANGLES = {2: [1.5708, 1.3]}
"""of SANA-Sprint's TrigFlow, where they are not even (SanaSprintPipeline's defaults)"""


def count(schedule: dict[str, Any]) -> int:
    return schedule.get("num_train_timesteps", 1000)


def trailing(steps: int, schedule: dict[str, Any]) -> list[float]:
    """Even steps from the last timestep: 999, 749, 499, 249 (Lin et al. 2023, table 2)."""
    n = count(schedule)
    return [float(round(n - i * (n / steps)) - 1) for i in range(steps)]


def consistency(steps: int, schedule: dict[str, Any]) -> list[float]:
    """Evenly skipped timesteps of those that were distilled: 999, 759, 499, 259 (LCMScheduler, TCDScheduler)."""
    gap = count(schedule) // CONSISTENCY
    return [float((CONSISTENCY - int(i * (CONSISTENCY / steps))) * gap - 1) for i in range(steps)]


def shift(t: float, schedule: dict[str, Any]) -> float:
    """tau = k t / (1 + (k - 1) t) (Esser et al. 2024, SD3, eq. 23)."""
    k = schedule.get("shift", 1.0)
    return k * t / (1 + (k - 1) * t)


def flow(steps: int, schedule: dict[str, Any]) -> list[float]:
    """Even steps from pure noise, shifted (FluxPipeline's sigmas)."""
    return [count(schedule) * shift(1 - i / steps, schedule) for i in range(steps)]


def shifted(steps: int, schedule: dict[str, Any]) -> list[float]:
    """Even steps from pure noise to the smallest noise there is, all shifted once more: 1000, 858, 602, 9 (Stability's
    sd3_infer.py, FlowMatchEulerDiscreteScheduler)."""
    n = count(schedule)
    last = shift(1 / n, schedule)
    return [n * shift(1 + (last - 1) * i / max(steps - 1, 1), schedule) for i in range(steps)]


def angles(steps: int, schedule: dict[str, Any]) -> list[float]:
    """TrigFlow's angles from pi/2 to 0, as the flow's time sin / (sin + cos) (SANA-Sprint, section 3.1)."""
    radians = ANGLES.get(steps) or [1.5708 * (1 - i / steps) for i in range(steps)]
    return [count(schedule) * math.sin(a) / (math.sin(a) + math.cos(a)) for a in radians]


RULES: dict[str, Rule] = {f.__name__: f for f in (trailing, consistency, flow, shifted, angles)}
