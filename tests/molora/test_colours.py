from __future__ import annotations

import pytest

from molora.colours import COLOURS, colour, ink


def test_colours_return_after_eight() -> None:
    assert colour(8) == colour(0) != colour(1)


@pytest.mark.parametrize("background", COLOURS)
def test_text_on_a_colour_is_legible(background: str) -> None:
    def luminance(of: str) -> float:
        channels = [int(of[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted([luminance(background), luminance(ink(background))])
    assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG 2.2, level AA
