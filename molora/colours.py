"""One colour for each expert, or whatever else is compared: the same on the terminal, in pictures and on pages."""

from __future__ import annotations

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/) with grey in place of black, which a dark page hides: told
# apart with every common kind of colour blindness, and by lightness in print.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")


def colour(expert: int) -> str:
    """``#rrggbb``; colours return after eight experts."""
    return COLOURS[expert % len(COLOURS)]


def ink(background: str) -> str:
    """``#000000`` or ``#ffffff``, whichever is read more easily on ``#rrggbb``: the higher contrast of WCAG 2.2."""
    channels = [int(background[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "#000000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#ffffff"
