"""The colours of probabilities can be told apart, and text on them can be read."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from trl_diffusion.viz.colours import (
    AFTER_END,
    CURVES,
    GRAY,
    KEPT,
    NEW,
    _of_terminal,
    colour,
    contrast,
    css,
    ink,
    terminal,
)


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
VISION = {
    "full": np.eye(3),
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])  # of linear sRGB


def seen(rgb, vision: str) -> np.ndarray:
    """A colour in CIELAB, as somebody with that vision sees it."""
    parts = np.array(rgb) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    x, y, z = XYZ @ np.clip(np.array(VISION[vision]) @ linear, 0, 1) / (XYZ @ np.ones(3))
    x, y, z = (part ** (1 / 3) if part > (6 / 29) ** 3 else part / (3 * (6 / 29) ** 2) + 4 / 29 for part in (x, y, z))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def distance(one, other, vision: str) -> float:
    """Difference of two colours (CIE76). 2.3 is just noticeable. With deuteranopia, red-yellow-green has 6 for 0.3 and
    0.7."""
    return float(np.linalg.norm(seen(one, vision) - seen(other, vision)))


@pytest.mark.parametrize("vision", VISION)
def test_probabilities_can_be_told_apart(vision):
    assert distance(colour(0.3), colour(0.7), vision) > 30
    assert distance(colour(0.3, KEPT), colour(0.7, KEPT), vision) > 8
    shown = [_of_terminal(colour(probability))[1] for probability in (0.3, 0.7)]
    assert distance(*shown, vision) > 25
    assert all(distance(one, other, vision) > 15 for one, other in itertools.combinations(CURVES, 2))
    lightness = [seen(colour(level / 10), vision)[0] for level in range(11)]
    assert all(4 < b - a < 11 for a, b in itertools.pairwise(lightness)), lightness


def test_text_can_be_read_on_every_colour():
    for level in [*(level / 100 for level in range(101)), float("nan")]:
        for strength in (NEW, KEPT, AFTER_END):
            assert contrast(ink(colour(level, strength)), colour(level, strength)) > 4.5
        assert contrast(GRAY, colour(level, AFTER_END)) > 4.5
        text, background = (int(part.split(";")[0]) for part in terminal(level).split("8;5;")[1:])
        shown = _of_terminal(colour(level))
        assert background == shown[0]
        assert contrast({16: (0, 0, 0), 231: (255, 255, 255)}[text], shown[1]) > 4.5


def test_map_is_viridis():
    pytest.importorskip("matplotlib", reason="needs the extra `viz`")
    from matplotlib import colormaps

    for level in range(101):
        theirs = colormaps["viridis"](level / 100, bytes=True)[:3]
        off = max(abs(int(a) - b) for a, b in zip(theirs, colour(level / 100), strict=True))
        assert off <= (16 if level % 10 else 1)  # between its tenths a straight line
    assert css(colour(0)) == "#440154" and css(colour(-1)) == css(colour(0)) and colour(2) == colour(1)
    assert contrast((255, 255, 255), (0, 0, 0)) == pytest.approx(21, rel=1e-6)
    assert contrast((118, 118, 118), (255, 255, 255)) == pytest.approx(4.54, rel=1e-3)  # a value of WCAG's
