"""The reference that a response is compared with is its own: precomputed, moved, resumed, of several collections."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from trl.trainer.utils import RepeatSampler

from tests.closeness import close_to
from tests.conftest import disturb, make_policy
from tests.offline.conftest import collection, prompt_dataset, run_collect, start  # noqa: F401
from tests.trainer.conftest import codes, make_dataset
from trl_diffusion import load_trajectories
from trl_diffusion.trainer.data import count_epochs
from trl_diffusion.trainer.reference import FILE, load_reference


PAIRS = {"loss_type": "dpo", "beta": 0.1, "learning_rate": 1e-2, "reward_funcs": None}


@pytest.fixture
def trajectories(collection):  # noqa: F811
    return load_trajectories(collection)


@pytest.fixture
def other(tmp_path, tokenizer, char_spec) -> str:
    """Another policy than the one that made the data, so that its reference has to be asked."""
    policy = make_policy(char_spec, seed=7, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    policy.save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


def logs_of(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# ------------------------------------------------------------------------------------------------------- precomputed


def simulated_epochs(num_rows, prompts, iterations, batches, accumulation, max_steps) -> int:
    """Epochs that a run of `max_steps` begins, by stepping through TRL's sampler."""
    responses = 4
    length = len(RepeatSampler(range(num_rows), responses, prompts, iterations * batches))
    batches_of_epoch = length // (prompts * responses)  # each repeats a rollout, of which training takes a part
    steps, epochs = 0, 0
    while steps < max_steps:
        epochs += 1
        for batch in range(1, batches_of_epoch + 1):
            if batch % accumulation == 0 or batch == batches_of_epoch:
                steps += 1
                if steps == max_steps:
                    break
    return epochs


@pytest.mark.parametrize("num_rows", [4, 7, 10, 24])
@pytest.mark.parametrize(
    ("prompts", "iterations", "batches", "accumulation"),
    [(4, 1, 1, 1), (4, 3, 1, 2), (2, 1, 2, 2), (3, 2, 3, 2), (4, 1, 4, 3)],
)
def test_epochs_are_counted_as_they_are_run(num_rows, prompts, iterations, batches, accumulation):
    args = SimpleNamespace(
        generation_batch_size=4 * prompts, num_generations=4, num_iterations=iterations, steps_per_generation=batches,
        gradient_accumulation_steps=accumulation, num_train_epochs=2.5,
    )  # fmt: skip
    for max_steps in (1, 5, 30):
        args.max_steps = max_steps
        expected = simulated_epochs(num_rows, prompts, iterations, batches, accumulation, max_steps)
        assert count_epochs(num_rows, args) == expected
    args.max_steps = -1
    assert count_epochs(num_rows, args) == 3


def test_an_incomplete_last_rollout(make_trainer, trajectories, other):
    """Of 7 rows, 4 at a time, each epoch leaves 3 out, so that there are more epochs than the rows alone say."""
    options = {**PAIRS, "dataset": trajectories.select(range(7)), "per_device_train_batch_size": 16, "max_steps": 6}
    options["optim"] = "sgd"  # Adam makes whole steps of what rounding leaves of a gradient of 0
    plain = make_trainer(other, **options)
    plain.train()
    early = make_trainer(other, precompute_ref_log_probs=True, **options)
    early.train()
    assert early.state.global_step == 6 and early.ref_model is None
    assert logs_of(early) == close_to(logs_of(plain))


def test_a_checkpoint_in_a_subfolder_has_its_own_reference(make_trainer, trajectories, start, other, tmp_path):  # noqa: F811
    """The one above it made the data. Before the first update, policy and reference are equal."""
    shutil.copytree(start, tmp_path / "both")
    shutil.copytree(other, tmp_path / "both" / "later")
    options = {**PAIRS, "dataset": trajectories.select(range(4)), "max_steps": 1}
    above = make_trainer(str(tmp_path / "both"), **options)
    below = make_trainer(str(tmp_path / "both"), model_init_kwargs={"subfolder": "later"}, **options)
    assert above.reference.recorded and not below.reference.recorded
    below.train()
    assert logs_of(below, "kl")[0] < 1e-6


def test_the_model_below_an_adapter_is_asked_in_the_precision_of_training(make_trainer, trajectories, other):
    """A new adapter changes nothing yet, so policy and reference are equal before the first update."""
    options = {**PAIRS, "dataset": trajectories.select(range(4)), "max_steps": 1, "bf16": True, "use_cpu": True}
    adapter = {"peft_config": LoraConfig(r=4, target_modules="all-linear")}
    trainer = make_trainer(other, kwargs=adapter, precompute_ref_log_probs=True, **options)
    trainer.train()
    assert logs_of(trainer, "kl")[0] < 1e-6 and abs(logs_of(trainer, "rewards/margins")[0]) < 1e-4


def test_an_evaluation_before_training_is_in_the_precision_of_training(make_trainer, start):  # noqa: F811
    """Nothing has moved yet, so policy and reference are equal."""
    options = {"beta": 0.1, "bf16": True, "use_cpu": True, "per_device_eval_batch_size": 8, "max_steps": 1}
    trainer = make_trainer(str(start), kwargs={"eval_dataset": make_dataset(2)}, **options)
    assert trainer.evaluate()["eval_kl"] < 1e-6
    trainer.train()
    assert logs_of(trainer, "kl")[0] < 1e-6


@pytest.fixture
def two_collections(trajectories, start, tokenizer, tmp_path):  # noqa: F811
    prompts = prompt_dataset(16).select(range(10, 16))
    second = load_trajectories(run_collect(start, tmp_path / "second", tokenizer, dataset=prompts, seed=6))
    both = concatenate_datasets([trajectories.select(range(4)), second.select(range(4))])
    assert both["row"][:] == [0, 1, 2, 3, 0, 1, 2, 3]
    return both


def test_collections_that_were_put_together(make_trainer, two_collections, other):
    """Before the first update policy and reference are the same, so every response is to be as likely under both."""
    options = {**PAIRS, "dataset": two_collections, "per_device_train_batch_size": 32, "max_steps": 1}
    trainer = make_trainer(other, precompute_ref_log_probs=True, **options)
    trainer.train()
    assert logs_of(trainer, "kl")[0] < 1e-6
    assert sorted({row for _, row in trainer.reference.estimates}) == list(range(8))


def test_numbers_of_rows(make_trainer, trajectories, two_collections, other):
    """A part of one collection in another order keeps its numbers, and with them its draws; numbers that repeat are those of
    the places in the dataset."""

    def numbers(dataset):
        return make_trainer(other, dataset=dataset, reward_funcs=None).train_dataset["row"][:]

    assert numbers(trajectories.select([7, 2, 5])) == [7, 2, 5]
    assert numbers(two_collections) == list(range(8))
    assert numbers(concatenate_datasets([trajectories.select([3]), trajectories.select([3])])) == [0, 1]
    assert numbers(trajectories.remove_columns("row").select([4, 5])) == [0, 1]
    without = concatenate_datasets([trajectories.select([3]), trajectories.remove_columns("row").select([4])])
    assert without["row"][:] == [3, None] and numbers(without) == [0, 1]


def test_evaluation_rows_have_their_own_reference(make_trainer, trajectories, other):
    """They have the numbers of other rows of the training set."""
    evaluation = trajectories.select(range(4, 8)).remove_columns("row")
    trainer = make_trainer(
        other, dataset=trajectories.select(range(4)), kwargs={"eval_dataset": evaluation}, precompute_ref_log_probs=True,
        per_device_eval_batch_size=4, max_steps=1, **PAIRS,
    )  # fmt: skip
    trainer.reference.precompute()
    assert trainer.evaluate()["eval_kl"] < 1e-6


def test_what_only_an_evaluation_is_given_is_checked(make_trainer, trajectories):
    trainer = make_trainer(dataset=trajectories.select(range(4)), max_steps=1, **PAIRS)
    assert "eval_kl" in trainer.evaluate(trajectories.select(range(4, 8)))
    broken = trajectories.select(range(4, 8)).map(
        lambda row, number: {
            "event_logps": [[0.5] * len(v) for v in row["event_logps"]] if number == 2 else row["event_logps"]
        },
        with_indices=True,
    )
    with pytest.raises(ValueError, match=r"^eval_dataset: Row 2, column `event_logps`, response 0: "):
        trainer.evaluate(broken)
    other = trajectories.select([4]).map(lambda row: {"tokenizer_fingerprint": "another"})
    with pytest.raises(ValueError, match=r"^eval_dataset: Row 0, column `tokenizer_fingerprint`: is another, but"):
        trainer.predict(other)
    pairs = Dataset.from_dict({"prompt": ["1"], "chosen": ["2"], "rejected": ["3"]})
    with pytest.raises(ValueError, match=r"^eval_dataset: pairs, and responses .* when the trainer is created"):
        trainer.evaluate(pairs)


def test_training_goes_on_after_the_reference_has_left(make_trainer, trajectories, other):
    options = {**PAIRS, "dataset": trajectories.select(range(4)), "max_steps": 2}
    trainer = make_trainer(other, precompute_ref_log_probs=True, **options)
    trainer.train()
    trainer.train()
    assert trainer.ref_model is None
    with pytest.raises(ValueError, match="The reference was removed from memory"):
        trainer.evaluate(trajectories.select(range(4, 8)))
    trainer.args.max_steps = 20
    with pytest.raises(ValueError, match="The reference was removed from memory"):
        trainer.train()


def test_a_run_goes_on_with_a_precomputed_reference(make_trainer, trajectories, other, tmp_path):
    """The checkpoint is inside a rollout that was made without it."""
    options = {**PAIRS, "dataset": trajectories.select(range(4)), "num_iterations": 2, "max_steps": 3}
    whole = make_trainer(other, save_strategy="steps", save_steps=1, **options)
    whole.train()
    part = make_trainer(other, precompute_ref_log_probs=True, **options)
    part.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    found, expected = logs_of(part, "kl"), logs_of(whole, "kl")
    assert part.ref_model is None and found == pytest.approx(expected, rel=1e-3) and min(found[1:]) > 0.01


@pytest.mark.parametrize("early", [True, False], ids=["precomputed", "recorded"])
def test_the_exact_log_ratio_without_a_pass_of_the_reference(
    make_trainer, trajectories, other, monkeypatch, early, request
):
    """`estimator_check_steps` compares with the reference of the loss, also where no step runs it."""
    options = {**PAIRS, "dataset": trajectories.select(range(4)), "max_steps": 1, "estimator_check_steps": 1}
    path = other if early else str(request.getfixturevalue("start"))
    found = make_trainer(path, precompute_ref_log_probs=early, **options)
    assert found.reference.recorded != early
    monkeypatch.setattr("trl_diffusion.trainer.data.fingerprint_policy", lambda *args, **kwargs: "somebody else")
    plain = make_trainer(path, **options)
    assert not plain.reference.recorded
    for trainer in (found, plain):
        disturb(trainer.model)
        trainer.train()
    for name in ("log_ratio", "bias", "std"):
        (value,), (expected,) = (logs_of(trainer, f"diffusion/check/{name}") for trainer in (found, plain))
        assert value == close_to(expected) and abs(value) > 1e-2


@pytest.mark.parametrize("adapted", [True, False], ids=["adapter", "whole"])
def test_recorded_log_probabilities_are_not_those_of_other_responses(make_trainer, trajectories, request, adapted):
    """The reference made the data; the responses to prompts that are given later are the policy's, which has moved."""
    kwargs = {"peft_config": LoraConfig(r=4, target_modules="all-linear")} if adapted else {}
    options = {
        **PAIRS,
        "dataset": trajectories.select(range(4)),
        "reward_funcs": codes,
        "per_device_eval_batch_size": 8,
    }
    trainer = make_trainer(str(request.getfixturevalue("start")), kwargs=kwargs, max_steps=1, **options)
    trainer.train()
    assert trainer.reference.recorded
    if adapted:
        assert trainer.evaluate(make_dataset(1))["eval_kl"] > 1e-3
    else:
        with pytest.raises(ValueError, match="The reference was not loaded, because it generated all responses"):
            trainer.evaluate(make_dataset(1))
    assert "eval_kl" in trainer.evaluate(trajectories.select([4]))


# ------------------------------------------------------------------------------------------------------------- moved

MOVED = {
    "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5, "beta": 0.2, "max_steps": 5,
    "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 8,
}  # fmt: skip


def train_moved(make_trainer, start, tmp_path, resume=None, **changes):  # noqa: F811
    options = {**MOVED, "output_dir": str(tmp_path / "run"), "dataset": make_dataset(6), **changes}
    trainer = make_trainer(str(start), **options)
    torch.manual_seed(3 if resume is None else 4)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2, "steps_per_generation": 2}])
def test_a_resumed_run_has_the_reference_of_the_uninterrupted_one(make_trainer, start, tmp_path, changes):  # noqa: F811
    """To the bit: the reference has moved at step 2, the checkpoint is at 3, and it moves again at 4."""
    whole = train_moved(make_trainer, start, tmp_path, **changes)
    part = train_moved(make_trainer, start, tmp_path, str(tmp_path / "run" / "checkpoint-3"), **changes)
    assert logs_of(whole) == logs_of(part) and logs_of(whole, "kl") == logs_of(part, "kl")
    fresh = make_trainer(str(start), **{**MOVED, "output_dir": str(tmp_path / "fresh")})
    for model in ("model", "ref_model"):
        expected, found = (dict(getattr(trainer, model).named_parameters()) for trainer in (whole, part))
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert not all(torch.equal(p, found[name]) for name, p in getattr(fresh, model).named_parameters())


def test_a_checkpoint_without_its_reference(make_trainer, start, tmp_path):  # noqa: F811
    trainer = train_moved(make_trainer, start, tmp_path, max_steps=3)
    checkpoint = tmp_path / "run" / "checkpoint-3"
    file = checkpoint / FILE
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=rf"checkpoint-3 cannot be resumed: {FILE} has \d+ bytes, not the {len(whole)}"
    ):
        train_moved(make_trainer, start, tmp_path, str(checkpoint))
    # A checkpoint that says nothing of its files:
    with pytest.raises(ValueError, match=f"{FILE} cannot be read"):
        load_reference(trainer.ref_model, checkpoint)
    torch.save({"weight": torch.zeros(2)}, file)
    with pytest.raises(
        ValueError, match=f"{FILE} holds the weights of another model than the reference, Qwen3ForCausalLM"
    ):
        load_reference(trainer.ref_model, checkpoint)
    file.unlink()
    with pytest.raises(
        ValueError, match=f"checkpoint-3 has no {FILE}, the reference that `sync_ref_model=True` had updated"
    ):
        load_reference(trainer.ref_model, checkpoint)


def test_a_checkpoint_of_a_reference_that_stays(make_trainer, start, tmp_path):  # noqa: F811
    train_moved(make_trainer, start, tmp_path, sync_ref_model=False, max_steps=3)
    assert not (tmp_path / "run" / "checkpoint-3" / FILE).exists()


def test_a_moved_reference_that_is_left_behind(make_trainer, start, tmp_path, caplog):  # noqa: F811
    train_moved(make_trainer, start, tmp_path, max_steps=3)
    train_moved(make_trainer, start, tmp_path, str(tmp_path / "run" / "checkpoint-3"), sync_ref_model=False)
    assert (
        "holds a reference that was updated during training. It is not loaded, because `sync_ref_model` is now False"
        in caplog.text
    )


def test_an_adapter_has_no_reference_to_move(make_trainer, start):  # noqa: F811
    with pytest.raises(ValueError, match="that of an adapter is the model below it"):
        make_trainer(str(start), sync_ref_model=True, beta=0.1, kwargs={"peft_config": LoraConfig(r=2)})
