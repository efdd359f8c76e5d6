"""Format numbers for tables and sentences."""

from experiment.comparison.statistics import Interval

MINUS = "\N{MINUS SIGN}"


def percent(value: float, *, sign: bool = False) -> str:
    """Write a fraction in percent with one digit, or two where one would show only zeros."""
    number = 100 * value
    digits = 1 if abs(number) >= 0.05 or abs(number) < 0.005 else 2
    text = f"{number:{'+' if sign else ''}.{digits}f}"
    return "0.0" if float(text) == 0 else text.replace("-", MINUS)


def with_half(interval: Interval, *, sign: bool = False) -> str:
    """Write `mean ± half` in percent; for one value `(n = 1)` behind it."""
    mean = percent(interval.mean, sign=sign)
    return f"{mean} (n = 1)" if interval.half is None else f"{mean} ± {percent(interval.half)}"


def limits(interval: Interval) -> str:
    """Write the interval's ends in percent."""
    if interval.lower is None or interval.upper is None:
        return "none (n = 1)"
    return f"{percent(interval.lower, sign=True)} to {percent(interval.upper, sign=True)}"


def p_text(p: float | None) -> str:
    """Write a p value."""
    if p is None:
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def count(number: int, noun: str) -> str:
    """Write a number with its noun."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
