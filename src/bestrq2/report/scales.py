"""Axes with round ticks, and numbers as text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Unit = Literal["number", "percent", "count"]


@dataclass(frozen=True)
class Tick:
    """One tick of an axis: `at` in percent of the axis, `text` as printed."""

    at: float
    text: str


@dataclass(frozen=True)
class Axis:
    """Linear axis from `low` to `high` (low < high).

    The unit "percent" is for shares in 0..1, "count" for whole numbers.
    """

    low: float
    high: float
    unit: Unit = "number"

    def percent(self, value: float) -> float:
        """Position of `value` along the axis in percent."""
        return round(100 * (value - self.low) / (self.high - self.low), 3)

    def ticks(self, about: int = 4) -> list[Tick]:
        """Roughly `about` ticks at round values inside the axis."""
        step = _round_step((self.high - self.low) / about)
        step = max(1.0, step) if self.unit == "count" else step
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [
            Tick(self.percent(index * step), tick_text(index * step, step, self.unit))
            for index in range(first, last + 1)
        ]


def padded_axis(low: float, high: float, unit: Unit = "number", padding: float = 0.06) -> Axis:
    """Axis over low..high with a margin of `padding` of the span; a single value is centred."""
    span = high - low
    if span <= 1e-12 * max(1.0, abs(high)):
        span = abs(high) or 1.0
        return Axis(low - span / 2, high + span / 2, unit)
    return Axis(low - padding * span, high + padding * span, unit)


def _round_step(raw: float) -> float:
    """Smallest of 1, 2, 2.5, 5 × 10^k that is at least `raw`."""
    power = 10.0 ** math.floor(math.log10(raw))
    # the tolerance keeps a rounding error of the division from doubling the step
    return next((factor * power for factor in (1, 2, 2.5, 5) if factor * power >= raw * (1 - 1e-9)), 10 * power)


def tick_text(value: float, step: float, unit: Unit) -> str:
    """Text of a tick with as many decimals as its step needs: "0.25", "1.5k", "40 %", "5e−4"."""
    if unit == "percent":
        return f"{_decimals(100 * value, 100 * step)}\u202f%"
    for factor, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return _decimals(value / factor, step / factor) + suffix
    if step < 1e-3 and abs(value) < 100 * step:  # three digits tell such ticks apart
        return _power_of_ten(value)
    return _decimals(value, step)


def _decimals(value: float, step: float) -> str:
    """`value` with the fewest decimals that show `step` exactly."""
    for places in range(12):
        if abs(round(step, places) - step) < 1e-6 * step:
            return _minus(f"{value:.{places}f}", value, places)
    return f"{value:.3g}"


def _minus(text: str, value: float, places: int) -> str:
    """A typographic minus sign, and none for a value that rounds to zero."""
    if round(value, places) == 0:
        return text.lstrip("-")
    return text.replace("-", "\u2212")


def _power_of_ten(value: float) -> str:
    """Up to three digits and a power of ten: "2.5e−4"."""
    digits, power = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(power)}".replace("-", "\u2212") if float(digits) else "0"


def number_text(value: float, unit: Unit = "number") -> str:
    """A measured value with about four digits: "62.4 %", "1,234", "0.01230", "−0.520"; "–" where it is not finite."""
    if not math.isfinite(value):
        return "–"
    if unit == "percent":
        return _minus(f"{100 * value:.1f}", 100 * value, 1) + "\u202f%"
    if unit == "count":
        return f"{value:,.1f}".removesuffix(".0")
    size = abs(value)
    if 0 < size < 1e-3:
        return _power_of_ten(value)
    places = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3 if size >= 0.1 or size == 0 else 5
    return _minus(f"{value:,.{places}f}", value, places)


def time_text(seconds: float) -> str:
    """Duration in the fitting unit: "41 s", "12.5 min", "3.2 h"."""
    factor, unit = time_unit(seconds)
    return f"{seconds / factor:.3g} {unit}" if factor > 1 else f"{seconds:.0f} s"


def time_unit(seconds: float) -> tuple[float, str]:
    """Seconds per unit, and the name of the unit that fits durations up to this one."""
    return next((pair for pair in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")) if seconds >= 2 * pair[0]), (1.0, "s"))
