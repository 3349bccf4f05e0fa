"""Axes: round tick values, their texts, and positions in percent of a plot."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Unit = Literal["number", "percent"]


@dataclass(frozen=True)
class Tick:
    """One tick: `at` in percent of the axis, `text` as printed."""

    at: float
    text: str


@dataclass(frozen=True)
class Axis:
    """A linear axis from `low` to `high` (low < high), in the data's unit."""

    low: float
    high: float
    unit: Unit = "number"

    def percent(self, value: float) -> float:
        """Position of `value` along the axis in percent, rounded to what a screen can show."""
        return round(100 * (value - self.low) / (self.high - self.low), 3)

    def ticks(self, about: int = 4) -> list[Tick]:
        """Roughly `about` ticks at round values inside the axis."""
        step = _round_step((self.high - self.low) / about)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [
            Tick(self.percent(index * step), tick_text(index * step, step, self.unit))
            for index in range(first, last + 1)
        ]


def padded_axis(low: float, high: float, unit: Unit = "number", padding: float = 0.06) -> Axis:
    """Axis that holds low..high with a margin of `padding` of the span; a single value gets room around it."""
    span = high - low
    if span <= 1e-12 * max(1.0, abs(high)):
        span = abs(high) or 1.0
        return Axis(low - span / 2, high + span / 2, unit)
    return Axis(low - padding * span, high + padding * span, unit)


def _round_step(raw: float) -> float:
    """Smallest of 1, 2, 2.5, 5 × 10^k that is at least `raw`."""
    power = 10.0 ** math.floor(math.log10(raw))
    return next((factor * power for factor in (1, 2, 2.5, 5) if factor * power >= raw * (1 - 1e-9)), 10 * power)


def tick_text(value: float, step: float, unit: Unit) -> str:
    """Text of a tick with as many decimals as its step needs: "0.25", "1.5k", "40 %", "5e−4"."""
    if unit == "percent":
        return f"{_decimals(100 * value, 100 * step)}\u202f%"
    for factor, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return _decimals(value / factor, step / factor) + suffix
    if step < 1e-3:
        return _power_of_ten(value)
    return _decimals(value, step)


def _decimals(value: float, step: float) -> str:
    for places in range(7):
        if abs(round(step, places) - step) < 1e-6 * step:
            return _minus(f"{value:.{places}f}", value, places)
    return f"{value:.3g}"


def _minus(text: str, value: float, places: int) -> str:
    if round(value, places) == 0:
        return text.lstrip("-")
    return text.replace("-", "\u2212")


def _power_of_ten(value: float) -> str:
    """Three digits and a power of ten, without idle zeros: "2.5e−4"."""
    digits, power = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(power)}".replace("-", "\u2212") if float(digits) else "0"


def number_text(value: float, unit: Unit = "number") -> str:
    """A measured value for people: "62.4 %", "1,234", "0.01230", "\u22120.520"; "–" where it is not finite."""
    if not math.isfinite(value):
        return "–"
    if unit == "percent":
        return _minus(f"{100 * value:.1f}", 100 * value, 1) + "\u202f%"
    size = abs(value)
    if 0 < size < 1e-3:
        return _power_of_ten(value)
    places = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3 if size >= 0.1 or size == 0 else 5
    return _minus(f"{value:,.{places}f}", value, places)
