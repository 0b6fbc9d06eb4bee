"""The states and weights of supervised fine-tuning, against the bound written out over all masks."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from tests.conftest import MASK, SPECS, STOP, make_policy
from tests.reference import masked_logps
from trl_diffusion.scoring.layout import join_rows, pack
from trl_diffusion.scoring.score import score
from trl_diffusion.sft.documents import IGNORED, DocumentCollator, Documents
from trl_diffusion.sft.masks import MaskConfig, document_states


LOSSES = {
    "elbo": MaskConfig(),
    "elbo, two masks": MaskConfig(num_masks=2),
    "mean": MaskConfig("mean"),
    "mean, complementary": MaskConfig("mean", complementary=True),
    "mean, complementary, two masks": MaskConfig("mean", complementary=True, num_masks=2),
    "mean, corrupted": MaskConfig("mean", max_corruption=0.4),
}


def make_documents(spec, lengths=((5, 9), (8, 12), (1, 7), (13, 3)), seed=0) -> Documents:
    """Some end with a stop token, some do not."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, (prompt, answer) in enumerate(lengths):
        ids = torch.randint(6, MASK, (prompt + answer,), generator=generator).tolist()
        labels = [IGNORED] * prompt + ids[prompt:]
        if number != 2:
            ids[-1] = labels[-1] = STOP
        rows.append({"input_ids": ids, "labels": labels})
    return Documents(**DocumentCollator(spec, STOP)(rows))


def groups_of(documents, spec, row) -> list[list[int]]:
    """The trained tokens that are masked together, as places of the canvas, and the autoregressive ones, found by hand."""
    prompt = int(documents.prompt_mask[row].sum())
    origin = 0 if spec.block_origin == "sequence" else prompt
    groups, autoregressive = {}, []
    for place in range(int(documents.canvas_lengths[row])):
        position = prompt + place - origin
        if not documents.trained[row, place]:
            continue
        if spec.first_token == "autoregressive" and position % spec.block_size == 0:
            autoregressive.append(place)
        else:
            groups.setdefault(position // spec.block_size if spec.attention == "block" else 0, []).append(place)
    return list(groups.values()), autoregressive


def log_probs_under(policy, spec, documents, row, hidden, shown=None):
    """Log-probability of each token of the canvas when the places in `hidden` are masked, from plain passes."""
    prompt = documents.prompt_ids[row][documents.prompt_mask[row] == 1].tolist()
    length = int(documents.canvas_lengths[row])
    canvas = documents.canvas_ids[row, :length].tolist()
    _, autoregressive = groups_of(documents, spec, row)
    masked = [place in hidden or not documents.trained[row, place] for place in range(length)]
    with torch.no_grad():
        return masked_logps(policy, spec, prompt, canvas, masked, [place in autoregressive for place in range(length)])


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "mean, corrupted"])
def test_each_mask_is_scored_and_weighed_by_hand(spec, policy, loss):
    """The weighted sum of scores, from the masks that were drawn: `N / m` for a masked token of a block of `N` trained tokens of which
    `m` are masked, 1 for an autoregressive one."""
    config, documents = LOSSES[loss], make_documents(spec)
    states = document_states(documents, spec, 3, config)
    layout = pack(documents.trajectories(), spec, states)
    found = (score(policy, layout, spec)[0].double() * layout.weights).sum(1)
    for row in range(4):
        groups, autoregressive = groups_of(documents, spec, row)
        expected, num_views = 0.0, states.hidden.shape[1]
        for view in range(num_views):
            hidden = set(states.hidden[row, view].nonzero().flatten().tolist())
            logps = log_probs_under(policy, spec, documents, row, hidden)
            assert all(bool(documents.trained[row, one]) or not documents.trained[row, one] for one in hidden)
            for group in groups:
                masked = hidden & set(group)
                weight = 1 if config.complementary else 2
                if config.weighting == "elbo":
                    assert masked
                    weight = len(group) / len(masked)
                share = num_views if not config.complementary else num_views / 2
                expected += weight / share * sum(logps[place] for place in masked)
            if view == 0:
                expected += sum(logps[place] for place in autoregressive)
        assert found[row].item() == pytest.approx(float(expected), rel=2e-5, abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_masks_depend_on_the_document_alone(spec, loss):
    """Other documents in the batch, their order and their padding change no state."""
    lengths = ((5, 9), (8, 12), (1, 7), (13, 3))
    together = make_documents(spec, lengths)
    states = document_states(together, spec, 1, LOSSES[loss])
    rows = [3, 1]
    few = Documents(**{name: values[rows] for name, values in vars(together).items()})
    alone = document_states(few, spec, 1, LOSSES[loss])
    for name in ("hidden", "coefficients", "weights", "shown"):
        if (found := getattr(alone, name)) is not None:
            assert torch.equal(found, getattr(states, name)[rows]), name
    other = document_states(together, spec, 2, LOSSES[loss])
    assert spec.block_size == 1 or not torch.equal(other.hidden, states.hidden)


def exact_loss(policy, spec, documents, row, config) -> float:
    """Expected loss of a document, from all masks of each group; the groups are independent (block attention)."""
    groups, autoregressive = groups_of(documents, spec, row)
    total = 0.0
    for group in groups:
        size = len(group)
        for number in range(size + 1):
            for masked in combinations(group, number):
                logps = log_probs_under(policy, spec, documents, row, set(masked))
                surprise = -sum(float(logps[place]) for place in masked)
                if config.weighting == "elbo":
                    chance = 1 / size / math.comb(size, number) if number else 0.0
                    total += chance * surprise * size / max(number, 1)
                else:  # a ratio that is uniform in 0 to 1, integrated
                    chance = math.factorial(number) * math.factorial(size - number) / math.factorial(size + 1)
                    total += chance * surprise * 2
    logps = log_probs_under(policy, spec, documents, row, set())
    return total - sum(float(logps[place]) for place in autoregressive)


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "mean, corrupted"])
@pytest.mark.parametrize("name", ["mask-predicted", "shift-of-four", "full-of-four"])
def test_the_mean_over_masks_is_the_bound(name, loss):
    """The estimate is unbiased: within four standard errors over 300 seeds of the sum over all masks."""
    four = SPECS["mask-predicted"]
    spec = {
        "mask-predicted": four,
        "shift-of-four": four.replace(token_shift=True, first_token="autoregressive"),
        "full-of-four": four.replace(attention="full", block_origin="response"),
    }[name]
    policy, config = make_policy(spec), LOSSES[loss]
    documents = make_documents(spec, ((5, 4),))
    one = {key: values.expand(300, *values.shape[1:]) for key, values in vars(documents).items()}
    many = Documents(**{**one, "numbers": torch.arange(300)})
    layout = pack(many.trajectories(), spec, document_states(many, spec, 0, config))
    with torch.no_grad():
        estimates = -(score(policy, layout, spec)[0].double() * layout.weights).sum(1)
    error = estimates.std() / len(estimates) ** 0.5
    exact = exact_loss(policy, spec, documents, 0, config)
    assert abs(float(estimates.mean()) - exact) < 4 * float(error) + 1e-4 * exact
    assert float(error) < 0.1 * exact  # so that the comparison says something


def test_numbers_of_masked_tokens_are_uniform():
    """`"elbo"`: 1 to N of N tokens, each equally often; and all tokens equally often."""
    spec = SPECS["mask-predicted"]
    documents = make_documents(spec, ((4, 4),))
    many = Documents(
        **{**{k: v.expand(4000, *v.shape[1:]) for k, v in vars(documents).items()}, "numbers": torch.arange(4000)}
    )
    hidden = document_states(many, spec, 0, MaskConfig()).hidden[:, 0]
    counts = torch.bincount(hidden.sum(1), minlength=5)
    assert counts[0] == 0
    assert ((counts[1:] - 1000).abs() < 4 * (4000 * 0.25 * 0.75) ** 0.5).all()
    assert ((hidden.sum(0) - 2500).abs() < 4 * (4000 * 0.625 * 0.375) ** 0.5).all()  # (1 + 2 + 3 + 4) / 4 of 4


def test_complementary_masks_score_each_token_once(spec):
    documents = make_documents(spec)
    states = document_states(documents, spec, 0, MaskConfig("mean", complementary=True))
    scored = (states.coefficients > 0).sum(1)[:, : documents.trained.shape[1]]
    assert torch.equal(scored, documents.trained.long())
    assert torch.equal(states.weights > 0, documents.trained)
    assert torch.equal(states.weights[documents.trained], torch.ones(int(documents.trained.sum())))


def test_corruption_replaces_the_share_that_it_says():
    """Visible tokens are replaced by tokens of the same document, half of the largest share on average; all trained tokens count."""
    spec = SPECS["full"]
    documents = make_documents(spec, ((5, 23),))
    many = Documents(
        **{**{k: v.expand(2000, *v.shape[1:]) for k, v in vars(documents).items()}, "numbers": torch.arange(2000)}
    )
    states = document_states(many, spec, 0, MaskConfig("mean", max_corruption=0.4))
    assert torch.equal(states.coefficients[:, 0] > 0, many.trained)
    assert set(states.shown.unique().tolist()) <= set(many.canvas_ids[0].tolist())
    wrong = (states.shown[:, 0] != many.canvas_ids).float()
    ids = documents.canvas_ids[0]
    different = (ids[:, None] != ids[None]).float().mean()  # chance that another token is another one
    shares = wrong.mean(1)
    error = shares.std() / 2000**0.5
    assert abs(shares.mean() - 0.2 * different) < 4 * error
    # The share differs between documents: with the same one for all, this would be the variance.
    rate = float(shares.mean())
    assert shares.var() > 1.5 * rate * (1 - rate) / len(ids)
    assert ((shares >= 0.35).float().mean() < 0.2) and ((shares == 0).float().mean() > 0.02)


def test_corrupted_documents_are_scored_as_they_are_shown():
    """A visible token that was replaced is predicted from what the policy sees, which is the wrong token."""
    spec = SPECS["full"]
    policy, documents = make_policy(spec), make_documents(spec)
    states = document_states(documents, spec, 5, MaskConfig("mean", max_corruption=0.5))
    layout = pack(documents.trajectories(), spec, states)
    logps = score(policy, layout, spec)[0]
    for row in range(4):
        length = int(documents.canvas_lengths[row])
        prompt = documents.prompt_ids[row][documents.prompt_mask[row] == 1]
        sees = states.shown[row, 0, :length].masked_fill(states.hidden[row, 0, :length], spec.mask_token_id)
        logits = policy(
            torch.cat([prompt, sees])[None],
            attention_mask=torch.ones(1, 1, len(prompt) + length, len(prompt) + length).bool(),
        ).logits[0]
        logits[:, spec.mask_token_id] = -torch.inf
        table = logits.log_softmax(-1)[len(prompt) :]
        expected = table.gather(1, documents.canvas_ids[row, :length, None]).squeeze(1)
        trained = documents.trained[row, :length]
        torch.testing.assert_close(logps[row, :length][trained], expected[trained], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("loss", ["elbo", "mean, complementary, two masks"])
def test_rows_of_several_documents_give_the_same(spec, policy, loss):
    """Joined rows: same scores, in any grouping, also where a document has a row of its own."""
    documents = make_documents(spec, ((5, 9), (8, 12), (1, 7), (13, 3), (2, 2)))
    layout = pack(documents.trajectories(), spec, document_states(documents, spec, 3, LOSSES[loss]))
    apart = score(policy, layout, spec)[0]
    for packs in ([0, 0, 1, 1, 2], [0, 0, 0, 0, 0], [0, 1, 0, 1, 0]):
        joined = join_rows(layout, torch.tensor(packs))
        valid = joined.allowed.valid
        assert len(joined.input_ids) == max(packs) + 1
        if packs[:2] == [0, 0]:
            assert valid.sum() == (layout.allowed.valid if spec.attention == "block" else layout.allowed).sum()
        torch.testing.assert_close(score(policy, joined, spec)[0], apart, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weighting": "sum"}, "`weighting` must be one of"),
        ({"num_masks": 0}, "`num_masks` must be a whole number of at least 1, got 0"),
        ({"complementary": True}, "`complementary` needs `weighting='mean'`"),
        ({"max_corruption": 0.1}, "`max_corruption` needs `weighting='mean'`"),
        ({"weighting": "mean", "max_corruption": 1.0}, "`max_corruption` must be a number of at least 0 and below 1"),
    ],
)
def test_settings_that_contradict_each_other(options, said):
    with pytest.raises(ValueError, match=said):
        MaskConfig(**options)
