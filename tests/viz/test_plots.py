"""Pictures of a response show what happened."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from PIL import Image
from transformers import AutoTokenizer

from tests.conftest import SPECS
from tests.viz.conftest import SPEC, save
from trl_diffusion import tiny_policy_path
from trl_diffusion.trajectories.revisions import NEVER, Revisions
from trl_diffusion.trajectories.trajectory import global_steps, response_blocks
from trl_diffusion.viz.colours import AFTER_END, KEPT, MASKED, NEW, UNKNOWN, colour, contrast
from trl_diffusion.viz.plots import MOST_CELLS, fitting_positions, num_cells, plot_trajectory


ROOT = Path(__file__).resolve().parents[2]
PICTURES = [*(ROOT / "docs" / "pictures").glob("*.png"), *(ROOT / "benchmarks").glob("*.png")]


def cells(axes) -> dict[tuple[int, int], object]:
    """The text in each cell that has one, by its line and position."""
    return {(int(text.get_position()[1]), int(text.get_position()[0])): text for text in axes.texts}


def faces(axes) -> np.ndarray:
    """The colours of the cells, of each step and position."""
    (mesh,) = (one for one in axes.collections if hasattr(one, "get_coordinates"))
    return np.asarray(mesh.get_array())


def longer(batch, times: int):
    """The same block again and again."""
    return dataclasses.replace(
        batch,
        canvas_ids=batch.canvas_ids.repeat(1, times),
        steps=batch.steps.repeat(1, times),
        logps=batch.logps.repeat(1, times),
        canvas_lengths=torch.full_like(batch.canvas_lengths, batch.canvas_ids.shape[1] * times),
    )


def test_global_steps_count_through_blocks():
    blocks = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2]])
    steps = torch.tensor([[1, 0, 1, 2, 0, 1, -1, -1]])
    assert global_steps(blocks, steps).tolist() == [[1, 0, 1, 4, 2, 3, -1, -1]]


def test_cells_hold_their_tokens_and_colours(answer, tokenizer, drawn, tmp_path):
    """Each token from its step on, as it is, in the colour of its probability, and readable."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path())
    added = {
        "<b>": "<b>",
        "\n": "↵",
        "a\tb": "a⇥b",
        "  ": "␣␣",
        "$x$": "$x$",
        "\x1b[0m": "\\x1b[0m",
        "\U0010fffd": "\U0010fffd",
    }
    added |= {"understandable!": "understanda…"}
    tokenizer.add_tokens(list(added))
    length = int(answer.canvas_lengths[0])
    batch = dataclasses.replace(answer, canvas_ids=answer.canvas_ids.clone(), steps=answer.steps.clone())
    batch.canvas_ids[0, : len(added)] = torch.tensor(tokenizer.convert_tokens_to_ids(list(added)))
    batch.logps = torch.linspace(0.02, 1.0, length).log()[None]
    batch.completion_lengths = torch.tensor([length - 3])
    blocks = response_blocks(SPEC, batch.prompt_lengths, length)
    steps = global_steps(blocks, batch.steps[:, :length])[0].tolist()
    plot_trajectory(batch, SPEC, tokenizer, tmp_path / "one.png", title="$5 and $6\n" * 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that no font has a character
        path = save(drawn[0], tmp_path / "deep" / "one.png")
    assert path.read_bytes()[:4] == b"\x89PNG" and [file.name for file in path.parent.iterdir()] == ["one.png"]
    axes = drawn[0].axes[0]
    image, texts = faces(axes), cells(axes)
    shown = [
        *added.values(),
        *(tokenizer.decode([token]) for token in batch.canvas_ids[0, len(added) : length].tolist()),
    ]
    for step in range(max(steps) + 1):
        for position, first in enumerate(steps):
            face, text = tuple(image[step, position].tolist()), texts.pop((step, position), None)
            if first > step:
                assert face == MASKED and text is None
                continue
            strength = AFTER_END if position >= length - 3 else NEW if first == step else KEPT
            assert face == colour(float(batch.logps[0, position].exp()), strength)
            assert text.get_text() == shown[position] and not text.get_parse_math()
            assert (text.get_weight() == "bold") == (first == step)
            assert contrast(tuple(round(255 * part) for part in to_rgb(text.get_color())), face) > 4.5
    assert not texts
    borders = {line.get_xdata()[0] for line in axes.lines}
    assert borders == {place for place in range(1, length) if blocks[0, place] != blocks[0, place - 1]}
    title = axes.get_title()
    assert title.startswith("$5 and $6↵$5") and title.endswith(" ...") and "\n" not in title
    assert len(title) * 5.5 / 72 <= drawn[0].get_figwidth()


def test_what_was_not_recorded_or_never_unmasked_has_no_colour(answer, tokenizer, drawn, tmp_path):
    batch = dataclasses.replace(answer, logps=torch.full_like(answer.logps, float("nan")), steps=answer.steps.clone())
    batch.steps[0, 2] = NEVER
    plot_trajectory(batch, SPEC, tokenizer, tmp_path / "one.png")
    (axes,) = drawn[0].axes  # without a scale of probabilities
    assert "probabilities were not recorded" in [text.get_text() for text in axes.texts]
    first = int((batch.steps[0] == 0).nonzero()[0])
    assert (faces(axes)[:, 2] == MASKED).all() and tuple(faces(axes)[0, first]) == UNKNOWN
    batch.steps[:] = NEVER
    plot_trajectory(batch, SPEC, tokenizer, tmp_path / "none.png")
    assert (faces(drawn[1].axes[0]) == MASKED).all()


def test_a_token_that_is_taken_back_is_struck_out_and_gone(answer, tokenizer, drawn, tmp_path):
    """Position 1 is written at step 1, taken back at step 2 and written again at step 4; position 2 is written over at step 3."""
    ids = tokenizer.convert_tokens_to_ids(["3", "1", "4", "2", "4"])
    batch = dataclasses.replace(
        answer, canvas_ids=answer.canvas_ids.clone(), steps=torch.full_like(answer.steps, NEVER), canvas_lengths=torch.tensor([3]),
        completion_lengths=torch.tensor([3]), logps=torch.full_like(answer.logps, 0.5).log(),
        revisions=Revisions(
            positions=torch.tensor([[1, 2]]), tokens=torch.tensor([ids[3:]]), steps=torch.tensor([[0, 0]]),
            until=torch.tensor([[1, 2]]), logps=torch.tensor([[0.25, 0.75]]).log(),
        ),
    )  # fmt: skip
    batch.canvas_ids[0, :3], batch.steps[0, :3] = torch.tensor(ids[:3]), torch.tensor([0, 3, 2])
    plot_trajectory(batch, SPECS["full"], tokenizer, tmp_path / "one.png")
    axes = drawn[0].axes[0]
    texts = cells(axes)
    shown = [
        [texts[line, place].get_text() if (line, place) in texts else "" for place in range(3)] for line in range(4)
    ]
    assert shown == [["3", "2", "4"], ["3", "2", "4"], ["3", "", "4"], ["3", "1", "4"]]
    bold = {place for place, text in texts.items() if text.get_weight() == "bold"}
    assert bold == {(0, 0), (0, 1), (0, 2), (2, 2), (3, 1)}
    found = [[tuple(face.tolist()) for face in line] for line in faces(axes)]
    assert [line[1] for line in found] == [colour(0.25), MASKED, MASKED, colour(0.5)]
    assert [line[2] for line in found] == [colour(0.75), colour(0.75, KEPT), colour(0.5), colour(0.5, KEPT)]
    (line,) = (one for one in axes.collections if isinstance(one, LineCollection))
    ((left, right),) = line.get_segments()
    assert left[1] == right[1] == 1.5 and 1 < left[0] < 1.5 < right[0] < 2
    assert num_cells(batch, SPECS["full"]) == 12


def test_a_long_response_is_drawn_in_part(answer, tokenizer, drawn, tmp_path):
    """Above the limit nothing is drawn, and memory is not spent; a part has the steps of its own positions only."""
    batch = longer(answer, 20)
    length = int(batch.canvas_lengths[0])
    assert num_cells(batch, SPEC) > MOST_CELLS >= num_cells(answer, SPEC)
    with pytest.raises(ValueError, match=rf"^{length} positions in \d+ steps are too many .*max_positions"):
        plot_trajectory(batch, SPEC, tokenizer, tmp_path / "one.png")
    assert not drawn and not list(tmp_path.iterdir())
    plot_trajectory(batch, SPEC, tokenizer, tmp_path / "one.png", max_positions=10)
    axes = drawn[0].axes[0]
    blocks = response_blocks(SPEC, batch.prompt_lengths, length)
    steps = global_steps(blocks, batch.steps)[0, :10].tolist()
    assert faces(axes).shape[:2] == (len(set(steps)), 10)
    assert [int(label.get_text()) for label in axes.get_yticklabels()] == [step + 1 for step in sorted(set(steps))]
    assert axes.get_xlabel() == f"position in the response (0 to 9 of {length})"
    assert min(drawn[0].get_size_inches()) * 150 > 300 and max(drawn[0].get_size_inches()) * 150 < 2000
    assert fitting_positions(batch, SPEC, 0, 10) == 10 and fitting_positions(answer, SPEC, 0, 500) == len(
        answer.steps[0]
    )
    fits = fitting_positions(batch, SPEC, 0, 500)
    assert fits * num_cells(batch, SPEC) // length <= MOST_CELLS < (fits + 1) * num_cells(batch, SPEC) // length
    drawn[0].set_size_inches(80, 1)
    with Image.open(save(drawn[0], tmp_path / "wide.png")) as picture:
        assert picture.size == (8000, 100)


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_pictures_of_the_documentation_can_be_read_in_its_column(path):
    """A column of 700 pixels shows letters of 8 points with at least 9 pixels if a picture was at most 8.6 inches wide."""
    with Image.open(path) as picture:
        assert picture.width / picture.info["dpi"][0] < 8.6
