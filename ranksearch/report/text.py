"""Format numbers for people: 1,180,160; 97.8 %; 55.3x; 3 min 20 s. One function per kind of number."""

from __future__ import annotations

from ranksearch.results.scores import is_percent

NO_VALUE = "\N{EN DASH}"
"""Text for a missing number."""

_MINUS = "\N{MINUS SIGN}"


def count(number: float) -> str:
    """A count, rounded, with thousands separators: `1,180,160`."""
    return f"{round(number):,}"


def ratio(number: float) -> str:
    """A ratio with about three digits: `55.3x`, `1,240x`."""
    return f"{number:.2f}x" if number < 9.995 else f"{number:.1f}x" if number < 999.95 else f"{number:,.0f}x"


def percent(fraction: float) -> str:
    """A fraction as per cent with one decimal: `97.8 %`."""
    return f"{100 * fraction:.1f} %"


def share(part: float) -> str:
    """A fraction as per cent; small is not shown as zero: `94.3 %`, `<0.1 %`."""
    return "<0.1 %" if 0 < part < 0.0005 else percent(part)


def score(value: float | None, score_name: str) -> str:
    """A score: `97.8 %` for accuracy and agreement, `0.9731` for any other."""
    if value is None:
        return NO_VALUE
    return percent(value) if is_percent(score_name) else _signed(f"{value:.4f}")


def difference(value: float, score_name: str) -> str:
    """A signed difference of scores: percentage points with one decimal for accuracy, else four decimals."""
    return _signed(f"{100 * value:+.1f}" if is_percent(score_name) else f"{value:+.4f}")


def chance(probability: float) -> str:
    """A probability as whole per cent; near certainty is not shown as certainty: `86 %`, `>99 %`."""
    return ">99 %" if probability > 0.995 else f"{100 * probability:.0f} %"


def interval(low: float, high: float, score_name: str) -> str:
    """An interval of a difference of scores: `[-1.9, +0.3]`."""
    return f"[{difference(low, score_name)}, {difference(high, score_name)}]"


def margin(width: float, score_name: str) -> str:
    """A distance between scores: `one point` or `10 points` for accuracy, a plain number for other scores."""
    if not is_percent(score_name):
        return f"{width:g}"
    points = f"{100 * width:g}"
    return "one point" if points == "1" else f"{points} points"


def milliseconds(value: float | None) -> str:
    """A latency with three digits: `0.420 ms`."""
    return NO_VALUE if value is None else f"{value:#.3g} ms" if value < 99.5 else f"{value:,.0f} ms"


def runtime(name: str) -> str:
    """A runtime as people write it."""
    return {"onnxruntime": "ONNX Runtime"}.get(name, name)


def duration(seconds: float) -> str:
    """A duration in its two largest units: `0.4 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes} min"


def with_noun(number: int, noun: str) -> str:
    """A number with its noun: `1 trial`, `45 trials`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _signed(number: str) -> str:
    """Drop the sign of zero, and replace a leading hyphen by a minus sign, which is as wide as a plus sign."""
    if not float(number):
        return number.lstrip("+-")
    return number.replace("-", _MINUS, 1)
