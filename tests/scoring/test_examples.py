"""The worked examples in the docstrings of scoring: what they print is what is printed there."""

from __future__ import annotations

import doctest

import pytest

from trl_diffusion.scoring.draws import draw_steps
from trl_diffusion.scoring.layout import pack
from trl_diffusion.scoring.states import drawn_states


@pytest.mark.parametrize("function", [draw_steps, drawn_states, pack], ids=lambda function: function.__name__)
def test_worked_examples(function):
    (example,) = doctest.DocTestFinder().find(function, function.__name__, globs={})
    report: list[str] = []
    failed, attempted = doctest.DocTestRunner().run(example, out=report.append)
    assert failed == 0, "".join(report)
    assert attempted >= 9
