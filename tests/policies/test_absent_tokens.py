"""
Ids that the tokenizer has no token for: never sampled, never trained. The measure is a policy whose vocabulary is padded with
rows that are likelier than everything else: it must be the policy without them, number for number, whichever way it is opened.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config

from tests.closeness import ROUNDING, assert_close
from tests.conftest import MASK, SPECS, make_policy, make_prompts, shared
from tests.offline.conftest import prompt_dataset, run_collect
from tests.trainer.conftest import codes
from trl_diffusion import (
    DecodingConfig,
    DiffusionSpec,
    DTRPOConfig,
    DTRPOTrainer,
    decode,
    generate,
    get_spec,
    load_trajectories,
    tiny_policy_path,
)
from trl_diffusion.decoding.config import DecodingConfig as Settings
from trl_diffusion.evaluation.generate import generate as answer
from trl_diffusion.evaluation.likelihood import chain_likelihoods, elbo_likelihoods
from trl_diffusion.offline.preferences import from_preferences
from trl_diffusion.policies.families.configs import Fast_dLLM_QwenConfig
from trl_diffusion.policies.forward import log_distribution
from trl_diffusion.policies.loading import resolve_spec
from trl_diffusion.policies.policy import open_policy
from trl_diffusion.policies.spec import check_spec
from trl_diffusion.scoring.layout import pack
from trl_diffusion.scoring.score import score
from trl_diffusion.scoring.states import all_states
from trl_diffusion.trajectories.dataset import check_trajectories


SIZE, PADDED = 100, 128  # tokens of the embedded policy, and rows of the padded one
PROMPTS = ["sudoku 3102200002100320", "countdown 30,100,93=23", "sudoku 0140432014020000"]


@pytest.fixture(scope="module")
def padded(tmp_path_factory) -> Path:
    """The embedded policy with rows that its tokenizer has no token for, and that are likelier than all it has."""
    directory = tmp_path_factory.mktemp("padded")
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_path())
    rows = model.get_input_embeddings().weight.detach().clone()
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path())
    assert len(rows) == len(tokenizer) == SIZE
    model.resize_token_embeddings(PADDED, mean_resizing=False)
    digits = [tokenizer.convert_tokens_to_ids(digit) for digit in "1234"]
    with torch.no_grad():
        model.get_input_embeddings().weight[:SIZE] = rows
        model.get_input_embeddings().weight[SIZE:] = 3 * rows[digits].repeat((PADDED - SIZE) // 4, 1)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_policy_path(), padding_side="left")


def words(ids: dict[str, int]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words with these ids."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(ids, unk_token="a")), unk_token="a")


# ------------------------------------------------------------------------------------------------ which ids these are


def test_padding_and_holes():
    """What the tokenizer lacks, except for tokens that the spec names."""
    tokenizer = words({"a": 0, "b": 1, "c": 5, "d": 6})
    config = Qwen3Config(vocab_size=12)
    fields = {"mask_token_id": 3, "stop_token_ids": [10]}
    assert resolve_spec(config, fields, tokenizer).absent_token_ids == ((2, 3), (4, 5), (7, 10), (11, 12))
    assert resolve_spec(config, {"mask_token_id": 3}, tokenizer).absent_token_ids == ((2, 3), (4, 5), (7, 12))
    assert resolve_spec(config, {**fields, "absent_token_ids": [[8, 9]]}, tokenizer).absent_token_ids == ((8, 9),)
    assert resolve_spec(config, {**fields, "absent_token_ids": []}, tokenizer).absent_token_ids == ()
    assert resolve_spec(config, fields).absent_token_ids is None  # nobody has said
    # A vocabulary without padding, and a tokenizer with more tokens than the model.
    for size in (7, 4):
        fields = {"mask_token_id": 1, "absent_token_ids": None}
        full = words({letter: index for index, letter in enumerate("abcdefg")})
        spec = resolve_spec(Qwen3Config(vocab_size=size), fields, full)
        assert spec == DiffusionSpec(mask_token_id=1) and "absent_token_ids" not in spec.to_dict()


def test_the_tokenizer_knows_better_than_what_was_stored():
    """Such as one that has got a token since."""
    config = Qwen3Config(vocab_size=12)
    config.diffusion_spec = {"mask_token_id": 3, "absent_token_ids": [[4, 12]]}
    assert get_spec(config).absent_token_ids == ((4, 12),)
    grown = words({letter: index for index, letter in enumerate("abcdef")})
    assert resolve_spec(config, None, grown).absent_token_ids == ((6, 12),)


def test_a_tokenizer_of_something_else():
    with pytest.raises(ValueError, match="has none of the 12 tokens of the model"):
        resolve_spec(Qwen3Config(vocab_size=12), {"mask_token_id": 3}, words({"a": 100}))


def test_a_published_vocabulary():
    """Fast-dLLM v2 7B: 151,666 tokens, 152,064 rows."""
    tokenizer = AutoTokenizer.from_pretrained(shared("fixtures", "fast_dllm_v2", "tokenizer"))
    spec = resolve_spec(Fast_dLLM_QwenConfig(vocab_size=152_064), None, tokenizer)
    assert spec.mask_token_id == 151_665 and spec.absent_token_ids == ((151_666, 152_064),)


@pytest.mark.parametrize(
    ("ranges", "error"),
    [
        ("7", "must be a list of ranges"),
        ([7], "must be a list of ranges"),
        ([[7, 7]], "in rising order"),
        ([[7, 9], [8, 10]], "in rising order"),
        ([[-1, 2]], "in rising order"),
        ([[7, 9.0]], "must be a list of ranges"),
        ([[3, 9]], "`absent_token_ids` holds 3, which is in `mask_token_id`"),
        ([[4, 9]], "`absent_token_ids` holds 5, which is in `stop_token_ids`"),
    ],
)
def test_wrong_ranges(ranges, error):
    with pytest.raises(ValueError, match=error):
        DiffusionSpec(mask_token_id=3, stop_token_ids=(5,), absent_token_ids=ranges)


def test_the_spec_is_stored_and_read():
    spec = DiffusionSpec(mask_token_id=3, absent_token_ids=[[4, 6], [9, 12]])
    assert DiffusionSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert [token for token in range(14) if spec.is_absent(token)] == [4, 5, 9, 10, 11]
    assert spec.is_absent(torch.tensor([3, 4, 11, 12])).tolist() == [False, True, True, False]
    with pytest.raises(ValueError, match="`absent_token_ids` holds 11, but the model's vocabulary has 10"):
        check_spec(spec, Qwen3Config(vocab_size=10))


# --------------------------------------------------------------------------------------------------- the distribution


@pytest.mark.parametrize("predicts_mask_token", [False, True])
def test_the_softmax_is_over_what_exists(predicts_mask_token):
    spec = DiffusionSpec(mask_token_id=3, predicts_mask_token=predicts_mask_token, absent_token_ids=[[1, 3], [8, 12]])
    logits = torch.randn(5, 12, dtype=torch.float64).float().requires_grad_()
    exist = [0, 3, 4, 5, 6, 7] if predicts_mask_token else [0, 4, 5, 6, 7]
    found = log_distribution(logits, spec, 0.7)
    expected = torch.full((5, 12), -torch.inf)
    expected[:, exist] = (logits.detach()[:, exist] / 0.7).log_softmax(-1)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-6)
    found[:, exist].sum().backward()
    absent = [token for token in range(12) if token not in exist]
    assert logits.grad.isfinite().all() and (logits.grad[:, absent] == 0).all() and (logits.grad[:, exist] != 0).all()


def test_autograd_keeps_no_more():
    """What is saved for the backward pass is as large as without absent tokens."""

    def saved(spec) -> int:
        sizes = []
        logits = torch.randn(50, 1000, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            log_distribution(logits * 1.0, spec, 0.7)
        return sum(sizes)

    plain = DiffusionSpec(mask_token_id=3, predicts_mask_token=True)
    for predicts in (False, True):
        spec = plain.replace(predicts_mask_token=predicts, absent_token_ids=((900, 1000),))
        assert saved(spec) == saved(plain) == 50 * 1000


@pytest.mark.parametrize(
    "name", ["block-from-sequence", "shift-autoregressive-first", "clean-causal-autoregressive-first", "full-shift"]
)
def test_decoding_and_scoring_share_one_distribution(name):
    spec = SPECS[name].replace(absent_token_ids=((12, 20), (25, MASK)))
    policy = make_policy(spec, num_hidden_layers=3)
    for config in (DecodingConfig(16, 1.3, tokens_per_step=2), DecodingConfig(16), DecodingConfig(16, 1.0, top_k=20)):
        batch = decode(policy, make_prompts_of(range(6, 12)), config, seeds=[1, 2, 3])
        tokens = set(batch.canvas_ids[batch.steps >= 0].tolist())
        assert len(tokens) > 3 and not tokens & {*range(12, 20), *range(25, 40)}
        if config.top_k is None:
            layout = pack(batch, spec, all_states(batch, spec))
            logps, _ = score(policy, layout, spec, config.temperature)
            counted = batch.completion_mask
            assert_close(batch.logps[counted], logps[counted].detach())


def make_prompts_of(tokens) -> list[list[int]]:
    return [[tokens[place % len(tokens)] for place in prompt] for prompt in make_prompts((3, 8, 13))]


# ------------------------------------------------------------------------------------------- every way to open a policy


def test_answers_are_those_of_the_policy_without_padding(padded, tokenizer):
    """`generate` and evaluation, greedy and sampled."""
    for settings in ({}, {"temperature": 1.0}, {"temperature": 0.3, "strategy": "threshold", "top_p": 0.9}):
        found = {}
        for path in (tiny_policy_path(), padded):
            model = AutoModelForCausalLM.from_pretrained(path)
            found[path] = generate(model, tokenizer, PROMPTS, max_new_tokens=17, **settings)
            given = generate(model, tokenizer, PROMPTS, max_new_tokens=17, spec=get_spec(model.config), **settings)
            assert given.texts == found[path].texts
        plain, other = found.values()
        assert torch.equal(other.trajectories.canvas_ids, plain.trajectories.canvas_ids)
        assert torch.equal(other.trajectories.steps, plain.trajectories.steps)
        assert_close(other.trajectories.logps, plain.trajectories.logps)
    plain, other = open_policy(tiny_policy_path()), open_policy(str(padded))
    assert other.spec.absent_token_ids == ((SIZE, PADDED),) and plain.spec.absent_token_ids is None
    ids = plain.encode(PROMPTS)
    answers = [answer(policy, ids, Settings(17, 1.0), [1, 2, 3])[0] for policy in (plain, other)]
    assert answers[0] == answers[1]
    for likelihoods in (
        lambda policy: [one.value for one in chain_likelihoods(policy, ids, answers[0])],
        lambda policy: elbo_likelihoods(policy, ids, answers[0], num_draws=4),
    ):
        assert likelihoods(other) == pytest.approx(likelihoods(plain), rel=1e-5)
    free = open_policy(str(padded), diffusion_spec={"absent_token_ids": []})
    assert max(answer(free, ids, Settings(17))[0][0]) >= SIZE  # what would be sampled otherwise


def test_a_collection_is_that_of_the_policy_without_padding(padded, tokenizer, tmp_path):
    rows = []
    for number, path in enumerate((tiny_policy_path(), padded)):
        run_collect(path, tmp_path / str(number), tokenizer, prompt_dataset(3))
        rows.append(load_trajectories(tmp_path / str(number)).to_list())
    for plain, other in zip(*rows, strict=True):
        for column in ("event_tokens", "event_steps", "reward_codes"):
            assert other[column] == plain[column]
        assert json.loads(other["spec"])["absent_token_ids"] == [[SIZE, PADDED]]


def train(path, directory: Path, **options):
    args = DTRPOConfig(
        output_dir=str(directory),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=14,
        tokens_per_step=2,
        learning_rate=1e-3,
        beta=0.1,
        max_steps=2,
        logging_steps=1,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    trainer = DTRPOTrainer(str(path), codes, args, prompt_dataset(8))  # its tokenizer is beside it
    trainer.train()
    return trainer


def test_training_is_that_of_the_policy_without_padding(padded, tmp_path):
    """Losses and KL of two steps; the spec is saved with the model; the rows of absent ids get no gradient."""
    before = AutoModelForCausalLM.from_pretrained(padded).get_input_embeddings().weight[SIZE:]
    plain, other = train(tiny_policy_path(), tmp_path / "plain"), train(padded, tmp_path / "padded")
    assert other.spec.absent_token_ids == ((SIZE, PADDED),)
    assert torch.equal(other.last_rollouts.canvas_ids, plain.last_rollouts.canvas_ids)
    for name in ("loss", "kl", "entropy", "grad_norm", "diffusion/recorded_gap/max"):
        logged = [[line[name] for line in run.state.log_history if name in line] for run in (plain, other)]
        assert len(logged[0]) == 2 and logged[1] == pytest.approx(logged[0], rel=1e-3, abs=ROUNDING)
    other.save_model(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert get_spec(again.config) == other.spec
    torch.testing.assert_close(again.get_input_embeddings().weight[SIZE:], before, rtol=0, atol=0)


# --------------------------------------------------------------------------------- ids that do not exist, in what is given


def test_stored_responses_with_a_token_that_does_not_exist(padded, tokenizer, tmp_path):
    run_collect(padded, tmp_path / "run", tokenizer, prompt_dataset(3))
    dataset = load_trajectories(tmp_path / "run")
    spec = resolve_spec(AutoModelForCausalLM.from_pretrained(padded).config, None, tokenizer)
    check_trajectories(dataset, spec, PADDED)
    rows = dataset.to_list()
    rows[1]["event_tokens"][2][3] = SIZE
    place = rows[1]["event_positions"][2][3]
    where = f"Row 1, column `event_tokens`, response 2: position {place} holds token 100, which the tokenizer does not"
    with pytest.raises(ValueError, match=where):
        check_trajectories(Dataset.from_list(rows), spec, PADDED)
    rows = dataset.to_list()
    rows[2]["prompt_ids"][4] = SIZE + 5
    with pytest.raises(
        ValueError, match="Row 2, column `prompt_ids`: position 4 holds token 105, which the tokenizer"
    ):
        check_trajectories(Dataset.from_list(rows), spec, PADDED)


@pytest.mark.parametrize("changes", [{"absent_token_ids": None}, {"predicts_mask_token": True}])
def test_log_probabilities_that_were_recorded_under_another_softmax(padded, tokenizer, tmp_path, changes):
    """They are no old policy's for this one. Responses without recorded ones are no matter."""
    run_collect(padded, tmp_path / "run", tokenizer, prompt_dataset(2))
    rows = load_trajectories(tmp_path / "run").to_list()
    spec = resolve_spec(AutoModelForCausalLM.from_pretrained(padded).config, None, tokenizer)
    (name,) = changes
    for row in rows:
        row["spec"] = json.dumps(spec.replace(**changes).to_dict())
    with pytest.raises(ValueError, match=f"Row 0, column `spec`: `{name}` was .* when these log-probabilities were"):
        check_trajectories(Dataset.from_list(rows), spec, PADDED)
    check_trajectories(Dataset.from_list([{**row, "event_logps": None} for row in rows]), spec, PADDED)


def test_preferences_with_a_token_that_does_not_exist(tokenizer):
    pairs = Dataset.from_list([{"prompt": "12=", "chosen": "3", "rejected": "4"}] * 2)
    four = tokenizer.convert_tokens_to_ids("4")
    spec = DiffusionSpec(mask_token_id=1, block_size=8, stop_token_ids=(2,), absent_token_ids=((four, four + 1),))
    with pytest.raises(ValueError, match=f"Row 0, column `rejected` holds token {four}, which the tokenizer does not"):
        from_preferences(pairs, tokenizer, spec)
    two = tokenizer.convert_tokens_to_ids("2")
    for absent, mask, what in (((two, two + 1), 1, f"token {two}"), ((98, 99), two, "the mask token")):
        spec = spec.replace(mask_token_id=mask, absent_token_ids=(absent,))
        with pytest.raises(ValueError, match=f"Row 0: the prompt holds {what}"):
            from_preferences(pairs, tokenizer, spec)


def test_prompts_and_stop_tokens_that_do_not_exist():
    spec = SPECS["block-from-sequence"].replace(absent_token_ids=((30, MASK),))
    policy = make_policy(spec)
    with pytest.raises(ValueError, match="Prompt 1 holds token 31, which the tokenizer does not have"):
        decode(policy, [[7], [8, 31]], DecodingConfig(8))
    with pytest.raises(ValueError, match="`stop_token_ids` holds 33, which the tokenizer does not have"):
        decode(policy, [[7]], DecodingConfig(8, stop_token_ids=(33,)))


def test_mask_tokens_are_not_collected(padded, tokenizer, tmp_path):
    decoding = DecodingConfig(14, steps_per_block=4, allow_mask_token=True)
    with pytest.raises(ValueError, match="`allow_mask_token=True` leaves mask tokens in responses"):
        run_collect(padded, tmp_path / "run", tokenizer, prompt_dataset(2), decoding=decoding)
    assert not (tmp_path / "run").exists()


def test_a_trainer_that_cannot_know_the_tokenizer(tmp_path):
    args = DTRPOConfig(str(tmp_path), bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match="its tokenizer is unknown. Pass it as `processing_class`"):
        DTRPOTrainer(make_policy(SPECS["block-from-sequence"]), codes, args, prompt_dataset(8))
