"""The method on one page: each function of recipes/dtrpo_loop.py against values worked out by hand, and a short run."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from recipes import dtrpo_loop as loop
from tests.closeness import assert_close
from tests.conftest import MASK, SPECS, STOP, make_policy, make_prompts
from trl_diffusion import DiffusionSpec, tiny_policy_path
from trl_diffusion.rewards import sudoku


PAGE = Path(loop.__file__)
FALSE_TRUE = {".": False, "x": True}


def bits(*rows: str) -> torch.Tensor:
    """A boolean matrix, drawn."""
    return torch.tensor([[FALSE_TRUE[cell] for cell in row.replace(" ", "")] for row in rows])


def small_trajectories(**changes) -> loop.Trajectories:
    """Blocks of 2 after a prompt of 1 token: the prompt shares block 0 with one token, blocks 1 and 2 have two each."""
    fields = {
        "tokens": torch.tensor([[7, 10, 11, 12, 13, STOP]]),
        "blocks": torch.tensor([[0, 0, 1, 1, 2, 2]]),
        "steps": torch.tensor([[-1, 0, 1, 0, 0, 0]]),
        "logps": torch.tensor([[0.0, -0.1, -0.2, -0.3, -0.4, -0.5]]),
        "completion": bits(".xxxxx"),
        "counted": bits(".xxxxx"),
        "autoregressive": bits("......"),
    }
    return loop.Trajectories(**{**fields, **changes})


def test_it_is_a_page_without_the_package():
    """At most 200 lines; of this package it takes what opens a checkpoint and what makes and scores puzzles, of TRL
    nothing."""
    lines = PAGE.read_text().splitlines()
    assert 100 <= len(lines) <= 200
    imported = set()
    for node in ast.walk(ast.parse(PAGE.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    of_us = {name for name in imported if name.startswith("trl")}
    names = ("DiffusionSpec", "get_spec", "tiny_policy_path", "rewards.sudoku")
    assert of_us == {f"trl_diffusion.{name}" for name in names}
    others = {name.partition(".")[0] for name in imported - of_us}
    assert others == {"argparse", "typing", "torch", "transformers"}


def test_its_letters_are_those_of_the_notation_table():
    page = (PAGE.parents[1] / "docs" / "architecture.md").read_text()
    table = dict(re.findall(r"^\| `([A-Z])` \| (.+?) \|", page, re.MULTILINE))
    assert set("RPCSTKWMNVH") <= set(table)
    legend = PAGE.read_text().split('"""')[1].split("one letter per dimension:")[1]
    used = dict(re.findall(r"\b([A-Z])  ([a-z]+ ?[a-z]*)", legend))
    assert set(used) == set("RPCSTNV")
    for letter, meaning in used.items():
        assert set(meaning.split()) <= set(re.findall(r"\w+", table[letter])), (letter, meaning, table[letter])


def test_blocks_are_numbered():
    spec = DiffusionSpec(mask_token_id=MASK, block_size=4)
    lengths = torch.tensor([6, 4, 1])
    from_sequence = loop.number_blocks(spec, lengths, 9)
    assert from_sequence.tolist() == [
        [-1, -1, -1, -1, 0, 0, 0, 0, 1],  # positions 4 and 5 are the end of the prompt
        [-1, -1, -1, -1, 0, 0, 0, 0, 1],
        [0, 0, 0, 0, 1, 1, 1, 1, 2],
    ]
    from_response = loop.number_blocks(spec.replace(block_origin="response"), lengths, 9)
    assert from_response.tolist() == [
        [-1, -1, -1, -1, -1, -1, 0, 0, 0],
        [-1, -1, -1, -1, 0, 0, 0, 0, 1],
        [-1, 0, 0, 0, 0, 1, 1, 1, 1],
    ]


def test_a_packed_row():
    """What is masked again, and who sees whom: rows look, columns are seen."""
    drawn = torch.tensor([[0, 0, 1, 1, 0, 0]])
    tokens, places, sees = loop.pack(SPECS["block-from-sequence"], small_trajectories(), drawn)
    assert tokens.tolist() == [[7, 10, 11, 12, 13, STOP] + [7, MASK, MASK, 12, MASK, MASK]]
    assert places.tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert torch.equal(
        sees[0],
        bits(
            "xx.... ......",
            "xx.... ......",
            "xxxx.. ......",
            "xxxx.. ......",
            "xxxxxx ......",
            "xxxxxx ......",
            "...... xx....",
            "...... xx....",
            "xx.... ..xx..",
            "xx.... ..xx..",
            "xxxx.. ....xx",
            "xxxx.. ....xx",
        ),
    )


def test_draws_are_of_steps_that_count():
    """Block 0 has one step, block 1 two, and of block 2 only the step before the stop token counts."""
    trajectories = small_trajectories(steps=torch.tensor([[-1, 0, 1, 0, 0, 1]]), counted=bits(".xxxx."))
    # Of block 1, the token of step 1 was more surprising than that of step 0.
    surprises = [1 - math.exp(-0.3), 1 - math.exp(-0.2)]
    later = 0.9 * surprises[1] / sum(surprises) + 0.05
    likely = [[1.0, 0.0], [1 - later, later], [1.0, 0.0]]
    torch.testing.assert_close(loop.chances(trajectories), torch.tensor([likely]))
    trajectories = loop.Trajectories(*(values.expand(4000, -1) for values in trajectories))
    drawn = loop.draw(trajectories, torch.Generator().manual_seed(0))
    assert (drawn[:, [0, 1, 4, 5]] == 0).all() and torch.equal(drawn[:, 2], drawn[:, 3])
    assert set(drawn[:, 2].tolist()) == {0, 1}
    assert abs(drawn[:, 2].float().mean() - later) < 4 * (later * (1 - later) / 4000) ** 0.5  # standard errors
    weights = loop.weigh(trajectories, drawn)
    assert (weights[:, [0, 5]] == 0).all()
    torch.testing.assert_close(weights[:, [1, 4]], torch.ones(4000, 2))
    torch.testing.assert_close(weights[:, 2], torch.where(drawn[:, 2] == 1, 1 / later, 0.0))
    torch.testing.assert_close(weights[:, 3], torch.where(drawn[:, 2] == 0, 1 / (1 - later), 0.0))


def test_autoregressive_tokens_are_in_every_pass():
    """With the first tokens of blocks 1 and 2 autoregressive, the draw is among the other steps."""
    trajectories = small_trajectories(steps=torch.tensor([[-1, 0, 0, 1, 0, 1]]), autoregressive=bits("..x.x."))
    drawn = loop.draw(trajectories, torch.Generator().manual_seed(0))
    assert drawn.tolist() == [[0, 0, 1, 1, 1, 1]]
    torch.testing.assert_close(loop.weigh(trajectories, drawn), torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0, 1.0]]))


def test_advantages():
    rewards = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0])
    found = loop.advantages_of(rewards, 3)
    torch.testing.assert_close(found, torch.tensor([-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]), atol=2e-4, rtol=1e-4)


def test_the_loss():
    """Two responses, three tokens: ratios 1.5 and 0.5, of which the first is clipped where the advantage is positive."""
    ratios = torch.tensor([[1.5, 0.5, 9.0], [1.5, 0.5, 1.0]])
    old = torch.tensor([[-1.0, -2.0, -1.0], [-1.0, -2.0, -3.0]])
    weights = torch.tensor([[3.0, 1.0, 0.0], [2.0, 0.0, 2.0]])
    loss = loop.grpo_loss(old + ratios.log(), old, weights, torch.tensor([1.0, -2.0]))
    first = (3 * 1.2 + 1 * 0.5) / 4
    second = (2 * 1.5 * -2 + 2 * 1.0 * -2) / 4
    torch.testing.assert_close(loss, torch.tensor(-(first + second) / 2))


def test_the_gradient_on_policy_is_the_policy_gradient():
    """Where nothing moved yet, a token's gradient is minus its advantage times its share of the response's weight."""
    logps = torch.tensor([[-1.0, -2.0, -torch.inf], [-1.0, -2.0, -3.0]], requires_grad=True)
    weights = torch.tensor([[3.0, 1.0, 0.0], [2.0, 0.0, 2.0]])
    loop.grpo_loss(logps, logps.detach(), weights, torch.tensor([1.0, -2.0])).backward()
    torch.testing.assert_close(logps.grad, torch.tensor([[-0.375, -0.125, 0.0], [0.5, 0.0, 0.5]]))


@pytest.mark.parametrize("name", ["block-from-sequence", "block-from-response", "shift-autoregressive-first"])
def test_what_denoising_remembers(name):
    """Two tokens a step, whole blocks, counted up to the stop token; what is recorded is what every later pass finds."""
    spec, prompts = SPECS[name], make_prompts()
    policy = make_policy(spec)
    found = loop.denoise(policy, spec, prompts, 3, 2, torch.Generator().manual_seed(0))
    again = loop.denoise(policy, spec, prompts, 3, 2, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    for row, prompt in enumerate(prompts):
        assert found.tokens[row, : len(prompt)].tolist() == prompt
        assert (found.steps[row, : len(prompt)] == -1).all() and not found.counted[row, : len(prompt)].any()
        answer = found.tokens[row][found.completion[row]].tolist()
        assert MASK not in answer and STOP not in answer[:-1]
        if STOP not in answer:  # then everything counts
            assert found.completion[row].sum() == (found.blocks[row] < 3).sum() - len(prompt)
        last = found.blocks[row][found.completion[row]].max()
        behind = found.counted[row] & ~found.completion[row]
        of_its_end = found.completion[row] & (found.blocks[row] == last)
        assert (found.blocks[row][behind] == last).all() and (found.counted[row] | ~found.completion[row]).all()
        settled = found.steps[row][of_its_end].max()
        in_sight = (found.steps[row] >= 0) & (found.blocks[row] == last) & (found.steps[row] < settled)
        assert torch.equal(behind, in_sight & ~found.completion[row])
        for block in range(3):
            steps = found.steps[row][(found.blocks[row] == block) & (found.steps[row] >= 0)]
            sizes = steps.bincount().tolist()
            alone = name == "shift-autoregressive-first" and len(steps) == 8
            assert sizes[0] == 1 if alone else all(size == 2 for size in sizes[:-1])
    drawn = loop.draw(found, torch.Generator().manual_seed(1))
    scored = loop.weigh(found, drawn) > 0
    logps = loop.score(policy, spec, found, drawn)
    assert_close(logps[scored], found.logps[scored])
    loss = loop.grpo_loss(logps, found.logps, scored.float(), torch.linspace(-1, 1, len(prompts)))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in policy.parameters())  # padding has log-probability -inf


def test_two_updates(monkeypatch, capsys):
    """It trains the embedded policy, prints what it gained, repeats itself, and leaves the global random state alone."""
    monkeypatch.setattr(sudoku, "evaluation_puzzles", lambda: ["3102200002100320", "0000341243210000"])
    policies = []
    load = AutoModelForCausalLM.from_pretrained

    def spy(*args, **kwargs):
        policies.append(load(*args, **kwargs))
        return policies[-1]

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    state = torch.random.get_rng_state()
    printed = []
    for _ in range(2):
        loop.main(["--updates", "2", "--puzzles", "2", "--answers", "4", "--seed", "3"])
        printed.append(capsys.readouterr().out)
    assert torch.equal(state, torch.random.get_rng_state())
    assert printed[0] == printed[1]
    assert re.fullmatch(
        r"(update \d: [\d.]+% solved, [\d.]+% of rows, columns and boxes right\n){2}"
        r"solve rate [\d.]+% -> [\d.]+% \(2 puzzles\)\n",
        printed[0],
    )
    start = load(tiny_policy_path())
    for trained in policies:
        pairs = zip(trained.parameters(), start.parameters(), policies[0].parameters(), strict=True)
        assert all(not torch.equal(a, b) and torch.equal(a, c) for a, b, c in pairs)
