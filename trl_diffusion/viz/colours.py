"""
The colours of probabilities, the same in a PNG, on a page and in a terminal. Needs neither matplotlib nor torch.

The map is viridis: its lightness rises evenly with the probability, so that people with any kind of colour vision, and a
black and white printer, tell two probabilities apart. Text on a colour is black or white, whichever is easier to read.
"""

from __future__ import annotations


Colour = tuple[int, int, int]  # red, green and blue, from 0 to 255

# matplotlib's viridis at probability 0, 0.1, ..., 1: dark for an unsure token, bright for a sure one.
VIRIDIS: tuple[Colour, ...] = (
    (68, 1, 84), (72, 36, 117), (65, 68, 135), (53, 95, 141), (42, 120, 142), (33, 145, 140), (34, 168, 132),
    (68, 191, 112), (122, 209, 81), (189, 223, 38), (253, 231, 37),
)  # fmt: skip
BLACK: Colour = (0, 0, 0)
WHITE: Colour = (255, 255, 255)
MASKED: Colour = (237, 237, 237)
UNKNOWN: Colour = (214, 222, 238)  # a probability that was not recorded
GRAY: Colour = (85, 85, 85)  # text after the end of the response
# Curves, as Okabe and Ito chose them for any kind of colour vision: blue, red, green, purple, orange, sky blue, black.
CURVES: tuple[Colour, ...] = (
    (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), BLACK,
)  # fmt: skip

# How much of its colour a token keeps, the rest is background: at the step that unmasked it, at later steps, and after
# the end of the response.
NEW, KEPT, AFTER_END = 1.0, 0.35, 0.15


def colour(probability: float, strength: float = NEW, background: Colour = WHITE) -> Colour:
    """
    The colour of a probability.

    Args:
        probability (`float`): from 0 to 1; NaN if it was not recorded.
        strength (`float`, *optional*, defaults to 1.0): share of the colour; the rest is `background`.
        background (`tuple`, *optional*): what lies behind. Defaults to white.

    Returns:
        `tuple` of red, green and blue, from 0 to 255.
    """
    full = UNKNOWN if probability != probability else _of_map(min(max(probability, 0.0), 1.0))
    return _mix(background, full, strength)


def ink(background: Colour) -> Colour:
    """Black or white, whichever is easier to read on `background`. The contrast is at least 4.58 on every colour."""
    return max(BLACK, WHITE, key=lambda text: contrast(text, background))


def contrast(one: Colour, other: Colour) -> float:
    """Contrast ratio of two colours as WCAG 2 defines it, from 1 to 21. Text needs 4.5."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def css(of: Colour) -> str:
    """A colour as CSS and matplotlib write it, such as `#440154`."""
    return "#{:02x}{:02x}{:02x}".format(*of)


def terminal(probability: float) -> str:
    """Parameters of the escape sequence (`\\x1b[...m`) for readable text on the colour of a probability, in the 256
    colours that every terminal has."""
    index, shown = _of_terminal(colour(probability))
    return f"38;5;{16 if ink(shown) == BLACK else 231};48;5;{index}"


def _of_map(probability: float) -> Colour:
    place = probability * (len(VIRIDIS) - 1)
    left = min(int(place), len(VIRIDIS) - 2)
    return _mix(VIRIDIS[left], VIRIDIS[left + 1], place - left)


def _mix(one: Colour, other: Colour, share: float) -> Colour:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


def _luminance(of: Colour) -> float:
    """Relative luminance of WCAG 2, from 0 to 1."""
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in (part / 255 for part in of)
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _of_terminal(of: Colour) -> tuple[int, Colour]:
    """The nearest of the 216 colours that terminals number from 16: six levels of red, green and blue."""
    levels = (0, 95, 135, 175, 215, 255)
    red, green, blue = (min(range(6), key=lambda level: abs(levels[level] - part)) for part in of)
    return 16 + 36 * red + 6 * green + blue, (levels[red], levels[green], levels[blue])
