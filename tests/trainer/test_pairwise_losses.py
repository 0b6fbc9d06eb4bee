"""The list of losses of `loss_type="dpo"` in training: TRL's own losses, what is refused, and the log's warning."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from tests.closeness import assert_close, assert_close_gradients, close_to
from tests.conftest import disturb, make_policy
from tests.offline.conftest import collection, start  # noqa: F401
from tests.trainer.conftest import blocks_of_one, make_dataset
from trl_diffusion import DTRPOConfig, load_trajectories
from trl_diffusion.trainer.batches import ungroup
from trl_diffusion.trainer.health import WINDOW, chosen_sinks


BETA = 0.3
# Ours, and TRL's.
COMBINATIONS = {
    "sigmoid": ({}, {}),
    "hinge": ({}, {}),
    "ipo": ({}, {}),
    "sft": ({"beta": 0.0}, {}),
    "robust": ({"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
    "sigmoid+ipo+sft": ({"dpo_loss_weights": [0.5, 2.0, 0.7]}, {"loss_weights": [0.5, 2.0, 0.7]}),
    "sigmoid_norm": ({"dpo_loss_type": ["sigmoid"], "dpo_length_normalization": True}, {}),
}


def preferences(size: int = 6) -> Dataset:
    """Pairs whose responses have lengths of their own."""
    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "chosen": row["solution"][: 6 + i], "rejected": row["puzzle"][: 12 - i]}
            for i, row in enumerate(make_dataset(size))
        ]
    )


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    ("name", "backbone", "estimator"),
    [
        *((name, "qwen3", "dtrpo") for name in COMBINATIONS),
        ("sigmoid", "qwen3", "exact"),
        ("sigmoid", "qwen2", "exact"),
    ],
)
def test_o8_blocks_of_one_give_trl_own_dpo_losses(make_trainer, tokenizer, tmp_path, name, backbone, estimator):
    """In blocks of one token: the mean of the losses that `DPOTrainer` has for one pair after the other, since it takes
    `"sft"` over the tokens of a batch."""
    spec, path = blocks_of_one(tokenizer, "autoregressive"), str(tmp_path / "start")
    model = make_policy(
        spec, backbone=backbone, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, initializer_range=0.1
    )
    model.save_pretrained(path)
    own, other = COMBINATIONS[name]
    rows, losses = preferences(), name.split("+")
    ours = make_trainer(
        path, spec=spec, reward_funcs=None, dataset=rows, loss_type="dpo", num_generations=2, estimator=estimator,
        **{"dpo_loss_type": losses, "beta": BETA, "per_device_train_batch_size": 2 * len(rows), **own},
    )  # fmt: skip
    theirs = DPOTrainer(
        model=path,
        args=DPOConfig(
            output_dir=str(tmp_path / "dpo"), beta=BETA, loss_type=losses, bf16=False, gradient_checkpointing=False,
            report_to="none", dataloader_pin_memory=False, **other,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )  # fmt: skip
    disturb(ours.model, 0.05)
    theirs.model.load_state_dict(ours.model.state_dict())
    for trainer in (ours, theirs):
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
    stored = [ours.train_dataset[i // 2] for i in range(2 * len(rows))]
    found = ours._compute_loss(ours.model, ours._generate_and_score_completions(stored))
    wanted = sum(
        theirs.compute_loss(theirs.model, theirs.data_collator([theirs.train_dataset[i]])) for i in range(len(rows))
    ) / len(rows)
    found.backward()
    wanted.backward()
    assert gradient(theirs.model).abs().max() > 1e-3
    assert name != "sigmoid" or abs(wanted.item() - 0.6931) > 1e-2
    assert_close(found, wanted)
    assert_close_gradients(gradient(ours.model), gradient(theirs.model))


@pytest.fixture
def pairwise(make_trainer, start, collection):  # noqa: F811
    def build(**options):
        options = {"loss_type": "dpo", "beta": 0.5, "per_device_train_batch_size": 40, **options}
        return make_trainer(str(start), reward_funcs=None, dataset=load_trajectories(collection), **options)

    return build


def logs_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_the_default_makes_the_chosen_responses_likelier(pairwise):
    trainer = pairwise(max_steps=8, num_draws=8, learning_rate=1e-3, max_grad_norm=1.0)
    assert trainer.args.dpo_loss_type == ["sigmoid", "sft"]
    trainer.train()
    logs = logs_of(trainer)
    assert logs[-1]["losses/sft"] < 0.9 * logs[0]["losses/sft"]
    assert abs(logs[0]["rewards/chosen"]) < 1e-4 and logs[-1]["rewards/chosen"] > 0.1
    assert logs[-1]["losses/sigmoid"] < logs[0]["losses/sigmoid"] == close_to(0.693147)
    for log in logs:
        assert log["loss"] == close_to(log["losses/sigmoid"] + log["losses/sft"])


def test_only_responses_in_a_pair_are_scored(pairwise):
    """The pass, which costs most of a step, leaves the others out; the loss is that of all."""
    trainer, every = pairwise(max_steps=1), pairwise(max_steps=1, pair_selection="all")
    found = {}
    for name, each in (("best_worst", trainer), ("all", every)):
        scoring = each.scoring

        def spy(inputs, iteration, scoring=scoring, name=name):
            found[name] = len(inputs["prompt_ids"])
            return scoring(inputs, iteration)

        each.scoring = spy
        each.train()
    assert found == {"best_worst": 20, "all": 40}  # 10 groups of 4


def test_sft_alone_needs_no_reference(pairwise):
    trainer = pairwise(max_steps=8, num_draws=8, learning_rate=1e-3, beta=0.0, dpo_loss_type=["sft"])
    assert trainer.ref_model is None
    trainer.train()
    logs = logs_of(trainer)
    assert logs[-1]["losses/sft"] < logs[0]["losses/sft"]
    assert not [name for log in logs for name in log if name in ("kl", "rewards/chosen", "rewards/accuracies")]


@pytest.mark.parametrize("estimator", ["mean_field", "exact"])
def test_the_likelihood_per_token_is_that_of_the_tokens_that_are_scored(pairwise, estimator):
    """Both give every token that they score the weight 1, and they score other tokens: `exact` those after the completion that
    were written before its last one as well."""
    trainer = pairwise(beta=0.0, dpo_loss_type=["sft"], estimator=estimator)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = [trainer.train_dataset[i // 4] for i in range(4 * len(trainer.train_dataset))]
    inputs = ungroup(trainer._generate_and_score_completions(rows))
    found = trainer._compute_loss(trainer.model, inputs)
    with trainer.scoring(inputs) as scored:
        weights = scored.layout.weights
        logps, _ = trainer.score_policy(trainer.model)
    assert set(weights.unique().tolist()) == {0.0, 1.0}
    more = weights.sum(1) - inputs["completion_mask"].sum(1)
    assert (more > 0).any() if estimator == "exact" else (more == 0).all()
    means = ((logps * weights).sum(1) / weights.sum(1)).view(-1, 4)
    best = inputs["pair_scores"].view(-1, 4).argmax(1, keepdim=True)
    assert_close(found, -means.gather(1, best).mean())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dpo_loss_type": ["sigmoid"], "loss_type": "dapo"}, "`dpo_loss_type` is for `loss_type` 'dpo', not for 'dapo'"),
        ({"dpo_loss_weights": [1.0], "loss_type": "dapo"}, "`dpo_loss_weights` is for `loss_type` 'dpo'"),
        ({"label_smoothing": 0.1, "loss_type": "dapo"}, "`label_smoothing` is for `loss_type` 'dpo'"),
        ({"dpo_loss_type": ["sigmoid", "apo"]}, "`dpo_loss_type` must be a list of names among .*, got .'sigmoid', 'apo'"),
        ({"dpo_loss_type": "sigmoid"}, "`dpo_loss_type` must be a list"),
        ({"dpo_loss_type": []}, "`dpo_loss_type` must be a list"),
        ({"dpo_loss_type": ["sft", "sft"]}, "names a loss twice"),
        ({"dpo_loss_weights": [1.0]}, r"`dpo_loss_weights` must be a list of 2 numbers .* one for each of"),
        ({"dpo_loss_weights": [1.0, -1.0]}, "`dpo_loss_weights` must be"),
        ({"dpo_loss_weights": [1.0, float("nan")]}, "`dpo_loss_weights` must be"),
        ({"dpo_loss_weights": [0.0, 0.0]}, "`dpo_loss_weights` must be"),
        ({"label_smoothing": 0.1}, r"`label_smoothing` is for the losses 'robust', not for `dpo_loss_type="),
        ({"label_smoothing": 0.5, "dpo_loss_type": ["robust"]}, "`label_smoothing` must be a number .* below 0.5"),
        ({"dpo_length_normalization": True, "dpo_loss_type": ["ipo"]}, "`dpo_length_normalization` is for the losses"),
        ({"beta": 0.0}, "needs a reference: set `beta`"),
        ({"dpo_loss_type": ["sft"]}, "looks at no reference; leave `beta` at 0.0, got 0.1"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(tmp_path, options, message):
    options = {"loss_type": "dpo", "beta": 0.1, **options}
    with pytest.raises(ValueError, match=message) as error:
        DTRPOConfig(str(tmp_path), bf16=False, per_device_train_batch_size=8, **options)
    assert "\n" not in str(error.value)


def history(chosen, accuracies):
    logs = [{"rewards/chosen": a, "rewards/accuracies": b} for a, b in zip(chosen, accuracies, strict=True)]
    return [entry for log in logs for entry in (log, {"eval_loss": 1.0})]  # others do not count


def test_what_a_sinking_reward_is():
    steps = range(4 * WINDOW)
    falling, rising = [-0.2 * step for step in steps], [0.2 * step for step in steps]
    better, worse = [0.5 + 0.02 * step for step in steps], [0.9 - 0.02 * step for step in steps]
    assert chosen_sinks(history(falling, better))
    assert not chosen_sinks(history(falling[: 2 * WINDOW - 1], better[: 2 * WINDOW - 1]))  # too early to say
    assert not chosen_sinks(history(rising, better))
    assert not chosen_sinks(history([0.1 * value for value in falling], better))  # by a tenth of what counts
    assert not chosen_sinks(history(falling, worse))
    assert not chosen_sinks(history([-6.0 + 0.1 * step for step in steps], better))  # low, but coming back
    dip = [0, 0.2, 0.2, -1.5, -1.6, -2.6, -2.7, -2.2, -1.5, -0.6, -0.2, -0.4, 0.2, 0.3]  # of a run that ended well
    assert not any(chosen_sinks(history(dip[:end], better[:end])) for end in range(len(dip) + 1))
    assert not chosen_sinks([])


@pytest.mark.parametrize("sinks", [True, False])
def test_the_log_warns_of_a_sinking_reward(pairwise, caplog, sinks):
    """Pushing the worse responses down takes the better ones along, unless something holds them."""
    losses = {"dpo_loss_type": ["sigmoid"]} if sinks else {"dpo_loss_weights": [1.0, 20.0]}
    trainer = pairwise(max_steps=14, beta=2.0, learning_rate=2e-2, num_draws=8, **losses)
    trainer.train()
    assert caplog.text.count("the better responses become less likely, too") == int(sinks), [
        (log["rewards/chosen"], log["rewards/accuracies"]) for log in logs_of(trainer)
    ]
