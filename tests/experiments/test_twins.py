"""Twins have the same weights to begin with, read the same documents in the same order, and learn from the same number of tokens."""

import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from trl.scripts import grpo

from trl_diffusion.experiments.arms import ARMS, TWINS
from trl_diffusion.experiments.reinforce import Budgets
from trl_diffusion.experiments.reinforce import build_trainer as build_rl_trainer
from trl_diffusion.experiments.twins import Material, build_trainer, flops_of_update, pretrain, updates_of
from trl_diffusion.policies.small import load_small
from trl_diffusion.sft.documents import IGNORED


def rows_read(trainer) -> list[tuple[list[int], list[bool]]]:
    """
    The tokens of every document that a trainer reads, in its order, and which of them are trained. Stop tokens that fill the last
    block behind the first one are left out.
    """
    found = []
    for batch in trainer.get_train_dataloader():
        if "labels" in batch:  # the autoregressive twin's
            for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
                kept = mask.bool()
                found.append((ids[kept].tolist(), (labels[kept] != IGNORED).tolist()))
        else:
            documents = zip(
                batch["prompt_ids"], batch["prompt_mask"], batch["canvas_ids"], batch["trained"], strict=True
            )
            for prompt, mask, canvas, trained in documents:
                prompt, answer = prompt[mask.bool()].tolist(), canvas[trained.bool()].tolist()
                answer = answer[: answer.index(2) + 1]
                found.append((prompt + answer, [False] * len(prompt) + [True] * len(answer)))
    return found


@pytest.fixture
def material(sizes) -> Material:
    return Material("chain", 7, sizes)


def test_parts_of_the_rows_are_disjoint(material):
    parts = [set(part["prompt"]) for part in (material.corpus, material.validation, material.prompts)]
    parts.append(set(material.whole.evaluation["prompt"]))
    assert [len(part) for part in parts] == [48, 4, 4, 6]
    assert len(set.union(*parts)) == 62


def test_twins_begin_with_the_same_weights(material, tmp_path):
    weights = [build_trainer(material, twin, 1, tmp_path).model.state_dict() for twin in TWINS]
    for other in weights[1:]:
        assert other.keys() == weights[0].keys()
        assert all(torch.equal(other[name], weights[0][name]) for name in other)
    another = build_trainer(Material("chain", 8, material.sizes), "full", 1, tmp_path).model.state_dict()
    assert not torch.equal(another["model.embed_tokens.weight"], weights[0]["model.embed_tokens.weight"])


def test_twins_read_the_same_tokens_in_the_same_order(material, tmp_path):
    read = {twin: rows_read(build_trainer(material, twin, 5, tmp_path)) for twin in TWINS}
    assert len(read["autoregressive"]) == 5 * 16
    for twin, rows in read.items():
        assert rows == read["autoregressive"], twin
    assert {sum(trained) for _, trained in read["full"]} == {8}  # seven cells and the stop token
    first, second = (rows[:48] for rows in (read["full"], read["full"][48:]))
    assert sorted(first)[:32] != sorted(second)  # the second epoch has begun, and has another order
    assert all(row in first for row in second)


@pytest.mark.parametrize("twin", ["full", "block", "full_corrupted"])
def test_equal_operations_are_within_two_per_cent(sizes, twin, tmp_path):
    material = Material("chain", 0, replace(sizes, pretrain_updates=400, equal="flops"))
    updates = updates_of(material, twin)
    costs = [flops_of_update(build_trainer(material, name, 1, tmp_path)) for name in ("autoregressive", twin)]
    assert updates * costs[1] == pytest.approx(800 * costs[0], rel=0.02)  # a task that needs longer
    assert updates_of(Material("chain", 0, replace(sizes, pretrain_updates=400)), twin) == 800
    assert updates_of(Material("sudoku_12", 0, replace(sizes, pretrain_updates=400)), twin) == 400


def test_counted_operations_are_those_of_the_matrix_products(material, tmp_path):
    """
    The autoregressive twin: forward and backward, 6 operations for each weight of the layers and each token, those of attention, and
    at most as many for the head as if every position were predicted.
    """
    trainer = build_trainer(material, "autoregressive", 1, tmp_path)
    config, batch = trainer.model.config, next(iter(trainer.get_train_dataloader()))
    rows, columns = batch["input_ids"].shape
    linear = [module for module in trainer.model.model.modules() if isinstance(module, torch.nn.Linear)]
    attention = 2 * columns * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    layers = 6 * rows * columns * (sum(layer.weight.numel() for layer in linear) + attention)
    head = 6 * rows * columns * trainer.model.lm_head.weight.numel()
    assert layers < flops_of_update(trainer) <= layers + head


def test_what_a_row_says_about_pretraining(material, tmp_path):
    rows = {twin: pretrain(material, twin, tmp_path / twin) for twin in ("autoregressive", "full")}
    for row in rows.values():
        assert row["documents"] == 160
        assert row["answer_tokens"] == 160 * 8
        assert row["tokens"] == 160 * (len("1>1234567") + 8)
        assert row["updates"] == 10  # a task that needs twice as many
    assert rows["full"]["parameters"] == rows["autoregressive"]["parameters"]
    assert rows["full"]["loss"] > 0 and rows["full"]["flops"] > 0


def test_rollouts_of_both_trainers_have_the_same_prompts(material, tmp_path, monkeypatch):
    seen = {}
    for name in ("autoregressive", "full"):
        pretrain(material, name, tmp_path / name)
        prompts = []

        def reward(prompts, completions, seen=prompts, **kwargs):
            seen.append(list(prompts))
            return [0.0] * len(prompts)

        material.whole.reward_funcs = [reward]
        trainer = build_rl_trainer(load_small(tmp_path / name), material, ARMS[name], 1e-3, 3, tmp_path / "rl")
        trainer.add_callback(Budgets(3, None, lambda name, step: None))
        trainer.train()
        seen[name] = prompts
    assert seen["autoregressive"] == seen["full"]
    assert [len(set(prompts)) for prompts in seen["full"]] == [2, 2, 2]  # groups of 4 among 8 answers


def test_the_autoregressive_rollout_is_batched_and_has_a_cache(material, tmp_path, monkeypatch):
    pretrain(material, "autoregressive", tmp_path / "twin")
    model = load_small(tmp_path / "twin")
    trainer = build_rl_trainer(model, material, ARMS["autoregressive"], 1e-3, 3, tmp_path / "rl")
    shapes, generate = [], type(model).generate

    def watch(module, args, kwargs):
        shapes.append((tuple(kwargs["input_ids"].shape), bool(kwargs.get("use_cache"))))

    def generating(self, *args, **kwargs):
        with self.register_forward_pre_hook(watch, with_kwargs=True):
            return generate(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "generate", generating)
    trainer.add_callback(Budgets(1, None, lambda name, step: None))
    trainer.train()
    assert shapes[0] == ((8, 9), True)  # all prompts at once
    assert shapes[1:] and set(shapes[1:]) == {((8, 1), True)}  # then one token a pass


def test_the_autoregressive_arm_learns_what_the_script_of_trl_teaches(material, tmp_path, monkeypatch):
    """The same weights to begin with, rows, reward and hyperparameters give the same weights after three updates, to the bit."""
    pretrain(material, "autoregressive", tmp_path / "twin")
    before = load_small(tmp_path / "twin").state_dict()
    trainer = build_rl_trainer(
        load_small(tmp_path / "twin"), material, ARMS["autoregressive"], 1e-3, 3, tmp_path / "rl"
    )
    trainer.add_callback(Budgets(3, None, lambda name, step: None))
    trainer.train()

    (tmp_path / "rows").mkdir()
    material.prompts.to_json(tmp_path / "rows" / "train.jsonl")
    material.tokenizer.save_pretrained(tmp_path / "twin")
    rewards = {function.__name__: function for function in material.whole.reward_funcs}
    monkeypatch.setitem(sys.modules, "rewards.of_the_task", SimpleNamespace(**rewards))
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script adds to it
    given = {name: getattr(trainer.args, name) for name in (
        "per_device_train_batch_size", "num_generations", "max_completion_length", "learning_rate", "lr_scheduler_type",
        "warmup_steps", "beta", "temperature", "seed",
    )}  # fmt: skip
    config = dict(
        given, output_dir=str(tmp_path / "script"), max_steps=3, bf16=False, gradient_checkpointing=False, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, dataset_name=str(tmp_path / "rows"),
        reward_funcs=[f"rewards.of_the_task.{name}" for name in rewards], model_name_or_path=str(tmp_path / "twin"),
    )  # fmt: skip
    grpo.main(*grpo.make_parser().parse_dict(config))

    after, arm = load_small(tmp_path / "script").state_dict(), trainer.model.state_dict()
    assert all(torch.equal(after[name], arm[name]) for name in arm)
    assert not torch.equal(after["model.norm.weight"], before["model.norm.weight"])


def test_the_budgets_of_a_run():
    reached, control = [], type("Control", (), {"should_training_stop": False})()
    budgets = Budgets(3, 0.05, lambda name, step: (reached.append((name, step)), time.sleep(0)))
    budgets.on_train_begin(None, None, control)
    step = 0
    while not control.should_training_stop:
        step += 1
        until = time.process_time() + 0.02
        while time.process_time() < until:
            pass
        budgets.on_step_end(None, type("State", (), {"global_step": step})(), control)
    assert reached[0][0] in ("updates", "seconds") and {name for name, _ in reached} == {"updates", "seconds"}
    assert dict(reached)["updates"] == 3
    assert len(budgets.clock) == step == 3 and budgets.clock == sorted(budgets.clock)
