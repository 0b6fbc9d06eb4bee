"""Training on stored responses: nothing is generated, nothing is scored twice, and bad data is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from tests.closeness import ROUNDING, assert_close, close_to
from tests.conftest import make_policy
from tests.offline.conftest import codes, collection, length, prompt_dataset, run_collect, start  # noqa: F401
from trl_diffusion import DecodingConfig, from_preferences, load_trajectories


def logs_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def count_forwards(trainer):
    """Forwards of policy and reference: with a gradient, and without."""
    counts = {"grad": 0, "no_grad": 0}

    def hook(module, args):
        counts["grad" if torch.is_grad_enabled() else "no_grad"] += 1

    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            model.register_forward_pre_hook(hook)
    return counts


OFFLINE = {"max_completion_length": 14, "learning_rate": 1e-2}


@pytest.fixture
def trajectories(collection):  # noqa: F811
    return load_trajectories(collection)


@pytest.fixture
def offline(make_trainer, start, trajectories):  # noqa: F811
    def build(dataset=None, model=None, reward_funcs=None, **options):
        return make_trainer(
            str(start) if model is None else model,
            reward_funcs=reward_funcs,
            dataset=trajectories if dataset is None else dataset,
            **{**OFFLINE, **options},
        )

    return build


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dpo"])
def test_no_forward_without_a_gradient(offline, beta, loss_type):
    if loss_type == "dpo" and not beta:
        pytest.skip("the pairwise loss needs a reference")
    trainer = offline(beta=beta, loss_type=loss_type, max_steps=4)
    assert trainer.ref_model is None
    counts = count_forwards(trainer)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert counts == {"grad": 4, "no_grad": 0}
    assert not all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    logs = logs_of(trainer)
    assert logs[0]["diffusion/recorded_gap/max"] < ROUNDING
    if beta:
        assert logs[0]["kl"] < 1e-6 < logs[-1]["kl"]


def test_stored_rewards_are_those_of_the_functions(offline, trajectories):
    """Stored or scored anew, the same rewards, advantages, losses and weights."""
    # Not with Adam, which makes whole steps of what rounding leaves of a gradient of 0.
    runs = [offline(reward_funcs=functions, max_steps=3, optim="sgd") for functions in (None, [codes, length])]
    for trainer in runs:
        trainer.train()
    logs = [logs_of(trainer) for trainer in runs]
    for stored, scored in zip(*logs, strict=True):
        assert stored["rewards/codes/mean"] == pytest.approx(scored["rewards/codes/mean"], rel=1e-6)
        assert stored["rewards/length/mean"] == pytest.approx(scored["rewards/length/mean"], nan_ok=True)
        assert stored["loss"] == close_to(scored["loss"])
    weights = [torch.cat([p.detach().flatten() for p in trainer.model.parameters()]) for trainer in runs]
    assert_close(*weights)


@pytest.mark.parametrize("loss_type", ["dapo", "dpo"])
def test_another_reference_costs_one_pass_and_is_reported(offline, tmp_path, tokenizer, char_spec, caplog, loss_type):
    other = make_policy(char_spec, seed=7, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    other.save_pretrained(tmp_path / "other")
    trainer = offline(model=str(tmp_path / "other"), beta=0.1, loss_type=loss_type, max_steps=3)
    assert trainer.ref_model is not None
    counts = count_forwards(trainer)
    trainer.train()
    assert counts == {"grad": 3, "no_grad": 3}
    assert logs_of(trainer)[0]["diffusion/recorded_gap/max"] > 1e-3
    assert logs_of(trainer)[0]["kl"] < 1e-6


def test_an_estimator_without_recorded_values_is_named(offline, caplog):
    """Its group losses have no ratio to the policy that made the responses. The pairwise loss needs none."""
    for options, warned in (
        ({"estimator": "elbo"}, True), ({"estimator": "dtrpo"}, False), ({"estimator": "elbo", "loss_type": "dpo", "beta": 0.1}, False)
    ):  # fmt: skip
        caplog.clear()
        offline(**options)
        assert ("'elbo' cannot use the recorded log-probabilities" in caplog.text) == warned


def test_the_recorded_reference_is_the_reference(offline, monkeypatch):
    """With the reference's own pass, the losses and weights are those with the recording."""
    recorded = offline(beta=0.1, max_steps=3, optim="sgd")
    recorded.train()
    monkeypatch.setattr("trl_diffusion.trainer.data.fingerprint_policy", lambda *args, **kwargs: "somebody else")
    scored = offline(beta=0.1, max_steps=3, optim="sgd")
    assert scored.ref_model is not None
    scored.train()
    for a, b in zip(logs_of(recorded), logs_of(scored), strict=True):
        assert a["loss"] == close_to(b["loss"]) and a["kl"] == close_to(b["kl"])


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["dtrpo", "elbo"])
def test_precomputed_reference_is_the_reference(offline, tmp_path, tokenizer, char_spec, estimator):
    """Precomputed for exactly the draws of every epoch and pass: the same losses, and no pass of the reference."""
    other = make_policy(char_spec, seed=7, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    other.save_pretrained(tmp_path / "other")
    options = dict(beta=0.1, loss_type="dpo", estimator=estimator, max_steps=15, learning_rate=1e-3, optim="sgd")
    plain = offline(model=str(tmp_path / "other"), **options)
    plain.train()
    early = offline(model=str(tmp_path / "other"), precompute_ref_log_probs=True, **options)
    counts = count_forwards(early)
    early.train()
    # (10 rows) x (1.5 epochs, rounded up), and one more pass for each update with elbo, whose old policy is not recorded
    assert counts["grad"] == 15 and early.ref_model is None
    assert [entry["loss"] for entry in logs_of(plain)] == close_to([entry["loss"] for entry in logs_of(early)])


def test_epochs_draw_afresh(offline):
    trainer = offline(num_train_epochs=3, max_steps=-1, per_device_train_batch_size=4, num_generations=4)
    draws = {}
    compute = trainer._get_per_token_logps_and_entropies

    def spy(*args, **kwargs):
        if trainer.scored is not None:
            draws.setdefault(row[0], []).append(trainer.scored.layout.weights.clone())
        return compute(*args, **kwargs)

    row, begin = [], trainer._generate_and_score_completions

    def spy_on_rows(inputs):
        row[:] = [inputs[0]["row"]]
        return begin(inputs)

    trainer._get_per_token_logps_and_entropies, trainer._generate_and_score_completions = spy, spy_on_rows
    trainer.train()
    assert sorted(draws) == list(range(10)) and all(len(weights) == 3 for weights in draws.values())
    differing = [not torch.equal(a[0], a[1]) or not torch.equal(a[1], a[2]) for a in draws.values()]
    assert sum(differing) >= 8
    gaps = [entry["diffusion/recorded_gap/max"] for entry in logs_of(trainer)]
    assert gaps[0] < ROUNDING < gaps[-1]  # the recording stays the old policy while the policy moves


def test_a_larger_group_gives_others_in_every_epoch(offline):
    trainer = offline(num_train_epochs=4, max_steps=-1, num_generations=2, per_device_train_batch_size=2)
    seen = {}
    respond = trainer._generate_single_turn

    def spy(*args, **kwargs):
        stored = trainer.rollout.stored
        seen[stored[0].row["row"], stored[0].epoch] = tuple(response.place for response in stored)
        return respond(*args, **kwargs)

    trainer._generate_single_turn = spy
    trainer.train()
    assert len(seen) == 40
    assert all(len(set(pair)) == 2 for pair in seen.values())
    assert all(len({seen[row, epoch] for epoch in range(4)}) > 1 for row in range(10))


@pytest.mark.parametrize("loss_type", ["dapo", "dpo"])
def test_groups_stay_together(offline, loss_type):
    """Through shuffling and splitting, a batch holds whole groups, each of one prompt, with its own rewards."""
    trainer = offline(
        loss_type=loss_type, beta=0.1, per_device_train_batch_size=8, gradient_accumulation_steps=2, num_iterations=2,
        max_steps=4,
    )  # fmt: skip
    rollouts, batches = [], []
    respond, check = trainer._generate_single_turn, trainer.check_estimator

    def spy_on_rollout(*args, **kwargs):
        rollouts.append([response.row["row"] for response in trainer.rollout.stored])
        return respond(*args, **kwargs)

    def spy_on_batch(inputs):
        batches.append((inputs["prompt_ids"].clone(), inputs["advantages"].clone()))
        return check(inputs)

    trainer._generate_single_turn, trainer.check_estimator = spy_on_rollout, spy_on_batch
    trainer.train()
    assert len(batches) == 8 and all(len(set(rows)) == 4 for rows in rollouts)
    for prompts, advantages in batches:
        for begin in (0, 4):
            group = slice(begin, begin + 4)
            assert (prompts[group] == prompts[begin]).all()
            assert advantages[group].sum().abs() < 1e-4 < advantages[group].abs().max()
        assert not torch.equal(prompts[0], prompts[4])
    seen = [{tuple(row.tolist()) for row in prompts} for prompts, _ in batches]
    assert seen[0] | seen[1] == seen[2] | seen[3] and seen[0].isdisjoint(
        seen[1]
    )  # each pass is over the whole rollout


def test_groups_without_a_pair_are_dropped_and_counted(offline, trajectories, caplog):
    rows = trajectories.to_list()
    for row in rows[:3]:
        row["reward_codes"] = [0.5] * 4
        row["reward_length"] = [None] * 4
    dataset = Dataset.from_list(rows)
    trainer = offline(dataset, loss_type="dpo", beta=0.1, max_steps=1)
    assert len(trainer.train_dataset) == 7
    for row in rows:
        row["reward_codes"], row["reward_length"] = [0.5] * 4, [None] * 4
    with pytest.raises(ValueError, match="same reward"):
        offline(Dataset.from_list(rows), loss_type="dpo", beta=0.1)


BAD = [
    ("format_version", lambda row: row.update(format_version=9), "Row 2, column `format_version`"),
    ("tokenizer", lambda row: row.update(tokenizer_fingerprint="0" * 32), "Row 2, column `tokenizer_fingerprint`"),
    ("masked", lambda row: drop_event(row, 1, 0), "Row 2, column `event_positions`, response 1: leaves position"),
    ("twice", lambda row: row["event_positions"][1].__setitem__(0, row["event_positions"][1][1]), "twice|leaves"),
    ("positive", lambda row: row["event_logps"][3].__setitem__(0, 0.5), "Row 2, column `event_logps`, response 3"),
    ("nan", lambda row: row["event_logps"][3].__setitem__(0, float("nan")), "`event_logps`, response 3: holds nan"),
    ("null", lambda row: row["event_logps"][3].__setitem__(0, None), "`event_logps`, response 3"),
    ("short", lambda row: row["event_logps"][0].pop(), "Row 2, column `event_logps`, response 0: holds"),
    ("long", lambda row: row["event_steps"][0].append(1), "Row 2, column `event_steps`, response 0: holds"),
    ("mask token", lambda row: row["event_tokens"][0].__setitem__(0, 1), "holds the mask token"),
    ("vocabulary", lambda row: row["event_tokens"][0].__setitem__(0, 10_000), "vocabulary"),
    ("gap in steps", lambda row: row["event_steps"].__setitem__(0, [s + 1 for s in row["event_steps"][0]]), "count from 0"),
    ("outside", lambda row: row["event_positions"][0].__setitem__(0, 400), "outside the canvas"),
    ("no response", lambda row: row.update(canvas_lengths=[]), "no response"),
    ("group", lambda row: row["completion_lengths"].pop(), "Row 2, column `completion_lengths`: holds 3 for 4"),
    ("reward", lambda row: row["reward_codes"].pop(), "Row 2, column `reward_codes`: holds 3 for 4"),
    ("temperature", lambda row: row.update(decoding=json.dumps({"temperature": 0.3})), "temperature=0.3"),
    *[
        (name, lambda row, name=name, value=value: row.update(decoding=json.dumps({"temperature": 1.0, name: value})), name)
        for name, value in (("top_k", 5), ("top_p", 0.9), ("suppress_tokens", [3]), ("approximate_cache", "dual"))
    ],
    ("spec", lambda row: row.update(spec=row["spec"].replace('"block_size": 8', '"block_size": 16')), "block_size"),
    ("unreadable spec", lambda row: row.update(spec="{"), "Row 2, column `spec`"),
    ("prompt", lambda row: row.update(prompt_ids=[]), "Row 2, column `prompt_ids`"),
    ("one response", lambda row: keep_first(row), "Row 2, column `canvas_lengths`: 1 responses, but `num_generations` is 4"),
]  # fmt: skip


def keep_first(row):
    for name, value in row.items():
        if isinstance(value, list) and name not in ("prompt", "prompt_ids"):
            row[name] = value[:1]


def drop_event(row, response, event):
    for name in ("event_steps", "event_positions", "event_tokens", "event_logps"):
        row[name][response].pop(event)


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_data_is_refused_by_row_and_column(offline, trajectories, char_spec, change, message, tmp_path):
    rows = copy.deepcopy(trajectories.to_list())
    change(rows[2])
    if "mask token" in message:
        rows[2]["event_tokens"][0][0] = char_spec.mask_token_id
    with pytest.raises(ValueError, match=message) as error:
        offline(Dataset.from_list(rows), output_dir=str(tmp_path / "out"))
    assert "train_dataset" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 8, "per_device_train_batch_size": 8}, "4 responses, but `num_generations` is 8"),
        ({"max_completion_length": 10}, "max_completion_length=10"),
        ({"temperature": 0.5}, "Set `temperature=1.0`"),
        ({"loss_type": "dpo"}, "beta"),
        ({"loss_type": "dpo", "beta": 0.1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, "multiple"),
        ({"loss_type": "dpo", "beta": 0.1, "pair_selection": "some"}, "pair_selection"),
        ({"decoding_order": "backwards"}, "decoding_order"),
        ({"sync_ref_model": True, "beta": 0.1}, "sync_ref_model"),
        ({"score_selection": True, "strategy": "sampled_confidence"}, "`decoding`: .* Set `score_selection`"),
        ({"score_selection": True}, "'confidence' needs no such score"),
        ({"score_selection": True, "strategy": "sampled_confidence", "estimator": "elbo"}, "`selection` is for"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_the_data(offline, options, message):
    with pytest.raises(ValueError, match=message):
        offline(**options)


def test_rewards_are_needed_from_somewhere(offline, trajectories):
    without = trajectories.remove_columns(["reward_codes", "reward_length"])
    with pytest.raises(ValueError, match="reward_funcs"):
        offline(without)
    offline(without, reward_funcs=codes, max_steps=1).train()
    with pytest.raises(TypeError, match="stream"):
        offline(trajectories.to_iterable_dataset())


def test_another_chat_template_is_noticed(offline, trajectories):
    rows = trajectories.to_list()
    for row in rows:
        row["prompt"] += " "
    with pytest.raises(ValueError, match="other tokens"):
        offline(Dataset.from_list(rows)).train()


def preference_rows():
    source = prompt_dataset(8)
    return [
        {"prompt": row["prompt"], "chosen": row["puzzle"][: 5 + i], "rejected": "1" * (9 - i % 3), "level": i}
        for i, row in enumerate(source)
    ]


@pytest.mark.parametrize(
    ("order", "estimator"),
    [("random", "dtrpo"), ("left_to_right", "elbo"), ("confidence", "dtrpo"), ("confidence", "elbo")],
)
def test_preferences_train(make_trainer, start, order, estimator):  # noqa: F811
    trainer = make_trainer(
        str(start), reward_funcs=None, dataset=Dataset.from_list(preference_rows()), loss_type="dpo", beta=0.1,
        decoding_order=order, num_generations=2, max_steps=12, estimator=estimator, learning_rate=3e-3,
    )  # fmt: skip
    counts = count_forwards(trainer)
    trainer.train()
    # The replay asked the reference and recorded what it said.
    expected = 0 if (order, estimator) == ("confidence", "dtrpo") else 12
    assert counts == {"grad": 12, "no_grad": expected}
    logs = logs_of(trainer)
    assert logs[0]["losses/sigmoid"] == pytest.approx(0.6931, rel=1e-3)
    assert (
        logs[-1]["losses/sigmoid"] < 0.65 and logs[-1]["rewards/margins"] > 0 and logs[-1]["rewards/accuracies"] > 0.7
    )
    assert {"rewards/chosen", "rewards/rejected", "kl", "pairs/count", "pairs/tied_groups"} <= set(logs[0])


def test_preference_formats_give_the_same_trajectories(tokenizer, char_spec):
    """Explicit or implicit prompt, plain or conversational; as TRL documents them."""
    rows = preference_rows()
    explicit = from_preferences(Dataset.from_list(rows), tokenizer, char_spec, seed=3)
    assert explicit["level"] == list(range(8)) and explicit[0]["reward_preference"] == [1.0, 0.0]
    for row, stored in zip(rows, explicit, strict=True):
        ids = tokenizer(row["prompt"])["input_ids"]
        assert stored["prompt_ids"] == ids and stored["event_logps"] is None
        for response, name in enumerate(("chosen", "rejected")):
            events = sorted(zip(stored["event_positions"][response], stored["event_tokens"][response], strict=True))
            assert tokenizer.decode([token for _, token in events][:-1]) == row[name]
            assert events[-1][1] == tokenizer.eos_token_id
    implicit = [
        {"chosen": row["prompt"] + "=" + row["chosen"], "rejected": row["prompt"] + "=" + row["rejected"]}
        for row in rows
    ]
    stored = from_preferences(Dataset.from_list(implicit), tokenizer, char_spec)
    whole = [tokenizer.decode(ids) for ids in stored["prompt_ids"]]
    assert all(text.startswith(row["prompt"]) for text, row in zip(whole, rows, strict=True))

    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    user = [{"role": "user", "content": "sudoku 1"}]
    answers = {
        name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "12"), ("rejected", "345"))
    }
    for row in ({"prompt": user, **answers}, {name: user + answer for name, answer in answers.items()}):
        stored = from_preferences(Dataset.from_list([row]), chatty, char_spec)[0]
        assert stored["prompt"] == user and tokenizer.decode(stored["prompt_ids"]) == "sudoku 1\n"
        texts = [
            tokenizer.decode([token for _, token in sorted(zip(positions, tokens, strict=True))])
            for positions, tokens in zip(stored["event_positions"], stored["event_tokens"], strict=True)
        ]
        assert [text.split("\n")[0] for text in texts] == ["12", "345"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"prompt": "a", "chosen": "1", "rejected": ""}], {}, "Row 0, column `rejected` is empty"),
        ([{"prompt": "a", "chosen": "1" * 40, "rejected": "2"}], {}, "column `chosen` has 41 tokens"),
        ([{"prompt": "a", "chosen": "1", "rejected": "2"}], {"num_generations": 4}, "num_generations"),
        (
            [{"prompt": "a", "chosen": "1", "rejected": "2"}],
            {"loss_type": "dapo", "beta": 0.0},
            "no log-probabilities were recorded",
        ),
    ],
)
def test_bad_preferences(make_trainer, start, rows, options, message):  # noqa: F811
    options = {"loss_type": "dpo", "beta": 0.1, "num_generations": 2, **options}
    with pytest.raises(ValueError, match=message):
        make_trainer(str(start), reward_funcs=None, dataset=Dataset.from_list(rows), **options)


def test_lora_on_stored_responses(offline):
    from peft import LoraConfig

    trainer = offline(beta=0.1, max_steps=1)  # the reference is the base model: what was recorded
    assert trainer.reference.recorded
    model = AutoModelForCausalLM.from_pretrained(trainer.model.config._name_or_path)
    assert model is not None
    from tests.trainer.conftest import make_dataset  # noqa: F401

    adapted = trainer.__class__(
        model=trainer.model.config._name_or_path,
        args=trainer.args,
        train_dataset=trainer.train_dataset,
        processing_class=trainer.processing_class,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    assert adapted.reference.recorded
    counts = count_forwards(adapted)
    adapted.train()
    assert counts == {"grad": 1, "no_grad": 0}


def test_evaluation_on_stored_responses(offline, trajectories):
    trainer = offline(
        trajectories.select(range(8)), kwargs={"eval_dataset": trajectories.select([8, 9])}, max_steps=2,
        eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=4, loss_type="dpo", beta=0.1,
    )  # fmt: skip
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    assert len(logs) == 1 and logs[0]["eval_rewards/codes/mean"] > 0 and "eval_rewards/margins" in logs[0]


@pytest.mark.parametrize(
    "settings",
    [{}, {"strategy": "sampled_threshold", "threshold": 0.4, "score_selection": True}],
    ids=["tokens", "selection"],
)
def test_what_is_scored_is_what_was_recorded(make_trainer, start, tokenizer, tmp_path, settings):  # noqa: F811
    """Log-probabilities are recorded and scored at the same temperature, and both with the selection or both without."""
    decoding = DecodingConfig(14, 0.7, tokens_per_step=2, **settings)
    directory = run_collect(start, tmp_path / "run", tokenizer, decoding=decoding)
    same = {
        "reward_funcs": None,
        "dataset": load_trajectories(directory),
        "temperature": 0.7,
        "max_steps": 1,
        **OFFLINE,
    }
    if settings:
        with pytest.raises(
            ValueError, match="Row 0, column `decoding`: .* Set `score_selection`, `strategy`, `threshold`"
        ):
            make_trainer(str(start), **same, **{**settings, "threshold": 0.5})
    trainer = make_trainer(str(start), **same, **settings)
    trainer.train()
    if settings:  # a token at the edge of the selection may fall on its other side, by rounding
        assert logs_of(trainer)[0]["diffusion/recorded_gap/mean"] < 0.01
    else:
        assert logs_of(trainer)[0]["diffusion/recorded_gap/max"] < ROUNDING
