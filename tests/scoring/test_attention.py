"""The packed layout's attention: token by token as docs/method.md says it, and the same by SDPA and by FlexAttention."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from tests.closeness import assert_close
from tests.conftest import SPECS, make_policy
from tests.reference import group_rollout, states_of
from trl_diffusion.policies.attention import (
    PLANNED,
    PLANNED_FLEX,
    TILE,
    PackedMask,
    bucket,
    enable_plans,
    planned_attention,
)
from trl_diffusion.policies.forward import check_attention
from trl_diffusion.scoring.estimators import ESTIMATORS, EstimatorConfig
from trl_diffusion.scoring.layout import pack
from trl_diffusion.scoring.score import score


# Two rows: a prefix of three tokens (the last one is padding in row 1), and two parts of four clean tokens, of which row 0
# has padding at the end of part 2, and two copies of two tokens.
BLOCKS = [
    [-2, -2, -1] + [0, 0, 1, 1, 0, 0, 1, 1] + [0, 0, 1, 1, 1, 1, 2, 2],
    [-2, -1, -1] + [0, 0, 1, 1, 1, 1, 0, 0] + [0, 0, 1, 1, 0, 0, 1, 1],
]
COPIES = [0, 0, 0] + [0, 0, 0, 0, 1, 1, 2, 2] * 2
PADDING = {(0, 18), (1, 2)}


def hand_made() -> PackedMask:
    valid = torch.tensor([[(row, column) not in PADDING for column in range(19)] for row in range(2)])
    return PackedMask(torch.tensor(BLOCKS), torch.tensor(COPIES), valid, prefix=3, count=2)


def may_look(row: int, query: int, key: int) -> bool:
    """docs/method.md, section 2, for one pair of tokens."""
    if query == key:
        return True
    if (row, key) in PADDING:
        return False
    part_of_query, part_of_key = (0 if at < 3 else 1 + (at - 3) // 8 for at in (query, key))
    if part_of_key not in (0, part_of_query):
        return False
    if COPIES[key]:
        return COPIES[key] == COPIES[query]  # a noisy token is seen from its own copy only
    if COPIES[query]:
        return BLOCKS[row][key] < BLOCKS[row][query]  # from a copy, the clean blocks before it
    return BLOCKS[row][key] <= BLOCKS[row][query]  # from a clean token, its own block as well


def test_every_pair_is_as_the_method_says():
    dense = hand_made().dense()
    assert dense.shape == (2, 1, 19, 19)
    for row, query, key in itertools.product(range(2), range(19), range(19)):
        assert bool(dense[row, 0, query, key]) == may_look(row, query, key), (row, query, key)


def layouts(name: str, share: bool, lengths=(13, 24, 3)):
    spec = SPECS[name]
    policy = make_policy(spec, max_position_embeddings=256)
    batch = group_rollout(policy, lengths=lengths)
    config = EstimatorConfig("coupled")
    return spec, policy, pack(batch, spec, states_of(batch, spec, config), ESTIMATORS["coupled"].one_row, share)


@pytest.mark.parametrize("share", [False, True])
def test_block_mask_is_the_dense_mask(share):
    _, _, layout = layouts("block-from-sequence", share, lengths=(93, 120, 61))
    mask, dense = layout.allowed.block_mask, layout.allowed.dense()
    count, _, size, _ = dense.shape
    rows, padded = 1 << (count - 1).bit_length(), bucket(size)
    assert mask.shape == (rows, 1, padded, padded) and padded > size > TILE
    pairs = create_mask(mask.mask_mod, rows, 1, padded, padded, device="cpu")
    assert torch.equal(pairs[:count, :, :size, :size], dense)
    assert not pairs[:count, :, :size, size:].any()
    alone = torch.eye(padded, dtype=torch.bool)  # what is added looks at itself
    assert torch.equal(pairs[:count, :, size:], alone[size:].expand(count, 1, -1, -1))
    assert torch.equal(pairs[count:], alone.expand(rows - count, 1, -1, -1))
    theirs = create_block_mask(mask.mask_mod, rows, 1, padded, padded, device="cpu", BLOCK_SIZE=TILE)
    assert torch.equal(mask.to_dense(), theirs.to_dense())
    assert torch.equal(mask.kv_num_blocks, theirs.kv_num_blocks)  # which tiles are looked at in part, and in whole
    assert torch.equal(mask.full_kv_num_blocks, theirs.full_kv_num_blocks)


def test_buckets():
    lengths = range(1, 20_000)
    buckets = [bucket(length) for length in lengths]
    assert all(length <= found and found % TILE == 0 for length, found in zip(lengths, buckets, strict=True))
    assert all(found <= max(1.25 * length, length + TILE) for length, found in zip(lengths, buckets, strict=True))
    assert len({found for found in buckets if 4096 < found <= 8192}) == 4


def outcome(policy, layout, spec):
    logps, entropies = score(policy, layout, spec, compute_entropy=True)
    policy.zero_grad()
    (logps * layout.weights).sum().backward()
    return logps.detach(), entropies, torch.cat([p.grad.flatten() for p in policy.parameters()])


@pytest.mark.parametrize(
    ("name", "share"), [("block-from-sequence", True), ("shift-autoregressive-first", False), ("clean-causal", True)]
)
@torch.no_grad()
def test_flex_attention_gives_the_same_numbers(name, share, monkeypatch):
    """Not compiled, and forward only: on a CPU, FlexAttention has no backward pass."""
    spec, policy, layout = layouts(name, share)
    assert enable_plans(policy) and policy.config._attn_implementation == PLANNED
    expected = score(policy, layout, spec, compute_entropy=True)
    calls = []

    def flex(self, *args, **kwargs):
        calls.append(self)
        return self.attend_flex(*args, **kwargs, compiled=False)

    monkeypatch.setattr(PackedMask, "attend", flex)
    found = score(policy, layout, spec, compute_entropy=True)
    assert len(calls) == policy.config.num_hidden_layers
    assert_close(found[0], expected[0])
    assert_close(found[1], expected[1])


def test_choosing_flex_attention():
    """`attn_implementation="flex_attention"` is taken; without a GPU the numbers are SDPA's own."""
    spec, policy, layout = layouts("block-from-sequence", True)
    expected = score(policy, layout, spec)[0]
    policy.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="'flex_attention' cannot run"):
        check_attention(policy)  # transformers' own function would take a boolean mask for a bias
    assert enable_plans(policy) and policy.config._attn_implementation == PLANNED_FLEX
    assert_close(score(policy, layout, spec)[0], expected)


def test_dropout_is_refused_by_flex_attention():
    states = torch.zeros(2, 1, 19, 8)
    with pytest.raises(ValueError, match="attention_dropout=0.1"):
        hand_made().attend_flex(None, states, states, states, dropout=0.1)


@pytest.mark.parametrize("extra", ["softcap", "s_aux", "position_bias"])
def test_attention_that_is_more_than_a_scaled_dot_product_is_refused(extra):
    states = torch.zeros(2, 1, 19, 8)
    with pytest.raises(ValueError, match=f"with `{extra}`"):
        planned_attention(None, states, states, states, None, hand_made(), **{extra: 1.0})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("share", [False, True])
def test_compiled_flex_attention_gives_the_same_numbers(share):
    spec, policy, _ = layouts("block-from-sequence", share)
    policy = make_policy(spec, hidden_size=64, head_dim=16, max_position_embeddings=256).cuda()
    batch = group_rollout(policy, lengths=(93, 120, 61))
    config = EstimatorConfig("coupled")
    layout = pack(batch, spec, states_of(batch, spec, config), ESTIMATORS["coupled"].one_row, share)
    results = []
    for implementation in ("sdpa", "flex_attention"):
        policy.set_attn_implementation(implementation)
        enable_plans(policy)
        results.append(outcome(policy, layout, spec))
    for ours, theirs, tolerance in zip(*results, (1e-4, 1e-3, 1e-2), strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=1e-2)
