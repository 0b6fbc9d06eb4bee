"""The trainer: its loss beside TRL's and by hand, what changes nothing, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from tests.conftest import make_policy
from trl_diffusion import DiffusionSFTConfig, DiffusionSFTTrainer, DiffusionSpec, get_spec, tiny_policy_path
from trl_diffusion.policies.training import train_padding_token
from trl_diffusion.rewards import sudoku
from trl_diffusion.scoring.layout import join_rows, pack, rows_to_join
from trl_diffusion.scoring.score import score
from trl_diffusion.seeds import SUPERVISED, derive_seed
from trl_diffusion.sft.documents import Documents
from trl_diffusion.sft.masks import document_states
from trl_diffusion.sft.setup import check_parallel


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_policy_path())


@pytest.fixture(scope="module")
def spec(tokenizer):
    return DiffusionSpec(mask_token_id=tokenizer.mask_token_id, block_size=8, stop_token_ids=(tokenizer.eos_token_id,))


def rows(size: int = 12) -> Dataset:
    """Prompts and completions of unequal lengths."""
    puzzles = sudoku.generate(size, seed=0)
    return Dataset.from_list(
        [
            {"prompt": sudoku.prompt(r["puzzle"])[: 10 + i % 7], "completion": r["solution"][: 3 + 5 * i % 13]}
            for i, r in enumerate(puzzles)
        ]
    )


COMMON = {
    "learning_rate": 1e-2, "max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "bf16": False,
    "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
}  # fmt: skip


@pytest.fixture
def make_trainer(tokenizer, spec, tmp_path):
    def build(dataset=None, model=None, arguments=None, **options):
        if model is None:
            model = make_policy(spec, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
        return DiffusionSFTTrainer(
            model=model,
            args=DiffusionSFTConfig(**{"output_dir": str(tmp_path / "out"), **COMMON, **options}),
            train_dataset=rows() if dataset is None else dataset,
            **{"processing_class": tokenizer, **(arguments or {})},
        )

    return build


def gradient_of(trainer, batch) -> tuple[float, torch.Tensor]:
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def weights_of(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_blocks_of_one_give_the_loss_of_trl(tokenizer, tmp_path, make_trainer):
    """With blocks of one token, token shift and an autoregressive first token, the policy is the causal model (O8): loss and
    gradient are those of `SFTTrainer` on the same rows."""
    causal = DiffusionSpec(
        mask_token_id=tokenizer.mask_token_id, block_size=1, token_shift=True, first_token="autoregressive",
        stop_token_ids=(tokenizer.eos_token_id,), predicts_mask_token=True,
    )  # fmt: skip
    model = make_policy(causal, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(tmp_path / "start")
    ours = make_trainer(model=str(tmp_path / "start"))
    theirs = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float32),
        args=SFTConfig(str(tmp_path / "theirs"), **COMMON),
        train_dataset=rows(),
        processing_class=tokenizer,
    )
    train_padding_token(theirs.model)  # of which transformers drops the gradient; here it never has one
    batch = next(iter(ours.get_train_dataloader()))
    plain = next(iter(theirs.get_train_dataloader()))
    assert int(batch["trained"].sum()) == int((plain["labels"] != -100).sum())
    theirs.model.train()
    reference = theirs.compute_loss(theirs.model, dict(plain))
    reference.backward()
    loss, gradient = gradient_of(ours, batch)
    assert loss == pytest.approx(reference.item(), rel=1e-5)
    expected = torch.cat([p.grad.flatten() for p in theirs.model.parameters()])
    assert ((gradient - expected).norm() / expected.norm()).item() < 1e-5


def test_the_loss_is_per_trained_token(make_trainer, spec):
    """The sum of weighted scores over the tokens that are trained, the fill of the last block included."""
    trainer = make_trainer()
    batch = next(iter(trainer.get_train_dataloader()))
    documents = Documents(**batch)
    seed = derive_seed(trainer.args.seed, SUPERVISED, 0, 0)
    layout = pack(documents.trajectories(), spec, document_states(documents, spec, seed, trainer.masks))
    with torch.no_grad():
        whole = -(score(trainer.model, layout, spec)[0] * layout.weights).sum()
    trained = 0  # up to the end of the block that holds the end-of-text token
    for prompt, canvas in zip(documents.prompt_mask.sum(1).tolist(), documents.canvas_ids.tolist(), strict=True):
        trained += -(-(prompt + canvas.index(trainer.processing_class.eos_token_id) + 1) // 8) * 8 - prompt
    assert gradient_of(trainer, batch)[0] == pytest.approx(float(whole) / trained, rel=1e-5)


@pytest.mark.parametrize("change", ["accumulated", "packed", "reversed"])
def test_what_changes_nothing(make_trainer, change):
    """A step is the same in parts, in packed rows, and in another order of the rows."""
    dataset = rows(8)
    sgd = {"optim": "sgd", "max_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 0.1}
    plain = make_trainer(dataset, **sgd)
    if change == "accumulated":
        other = make_trainer(dataset, **{**sgd, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4})
    elif change == "packed":
        other = make_trainer(dataset, packing=True, max_length=60, **sgd)
        assert len(other.train_dataset) < 8
    else:
        other = make_trainer(dataset.select(range(7, -1, -1)), **sgd)
    start = weights_of(plain)
    assert torch.equal(start, weights_of(other))
    plain.train()
    other.train()
    step = (weights_of(plain) - start).norm()
    assert step > 0
    assert ((weights_of(plain) - weights_of(other)).norm() / step).item() < 1e-4
    losses = [[log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in (plain, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_tied_weights_are_not_missing(make_trainer, monkeypatch):
    """A head that is the embedding is in a checkpoint under the name of the embedding."""
    said: list[str] = []
    monkeypatch.setattr(transformers.trainer.logger, "warning", said.append)
    trainer = make_trainer(model=tiny_policy_path())
    assert trainer.model.config.tie_word_embeddings
    weights = trainer.model.state_dict()
    for missing in (["lm_head.weight"], ["lm_head.weight", "model.norm.weight"]):
        left = {name: weight for name, weight in weights.items() if name not in missing}
        trainer._issue_warnings_after_load(trainer.model.load_state_dict(left, strict=False))
    assert said == ["There were missing keys in the checkpoint model loaded: ['model.norm.weight']."]


def test_an_interrupted_run_goes_on_exactly(make_trainer, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **saving)
    whole.train(resume_from_checkpoint=True)  # there is none yet
    resumed = make_trainer(output_dir=str(tmp_path / "whole"), **saving)
    (tmp_path / "whole" / "checkpoint-4" / "trainer_state.json").unlink()  # it was killed while it wrote this one
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(weights_of(whole), weights_of(resumed))
    losses = [[log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_masks_change_from_step_to_step_and_not_between_evaluations(make_trainer):
    trainer = make_trainer(
        learning_rate=0.0, max_steps=3, per_device_train_batch_size=12, arguments={"eval_dataset": rows()}
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(set(losses)) == 3
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("change", [{"per_device_eval_batch_size": 5}, {"eval_packing": True, "max_length": 60}])
def test_an_evaluation_is_over_tokens(make_trainer, change):
    """Its figures do not depend on how rows are put into batches."""
    first = make_trainer(per_device_eval_batch_size=12, arguments={"eval_dataset": rows()}).evaluate()
    second = make_trainer(arguments={"eval_dataset": rows()}, **change).evaluate()
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert first[name] == pytest.approx(second[name], rel=1e-5), name


def test_the_mask_token_is_no_prediction(make_trainer):
    """It is never written, so a large logit of it changes no figure of an evaluation."""
    trainer = make_trainer(arguments={"eval_dataset": rows()})
    head, spec = trainer.model.get_output_embeddings(), trainer.spec
    head.register_forward_hook(
        lambda module, given, logits: logits.index_fill(-1, torch.tensor(spec.stop_token_ids), 50)
    )
    before = trainer.evaluate()
    assert before["eval_mean_token_accuracy"] > 0
    head.register_forward_hook(
        lambda module, given, logits: logits.index_fill(-1, torch.tensor(spec.mask_token_id), 1e4)
    )
    after = trainer.evaluate()
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert after[name] == pytest.approx(before[name], rel=1e-5), name


def test_block_sizes_follow_one_another(make_trainer, spec):
    """Equally many steps for each, the last one is that of the policy, which is saved."""
    trainer = make_trainer(block_sizes=[1, 4, 8], max_steps=6)
    seen = []
    look = trainer.spec_at
    trainer.spec_at = lambda step: seen.append(look(step).block_size) or look(step)
    trainer.train()
    assert seen == [1, 1, 4, 4, 8, 8]
    assert get_spec(trainer.model.config) == trainer.spec and trainer.spec.block_size == 8


def test_it_learns(make_trainer):
    """A policy that is trained on the same rows over and over predicts them."""
    trainer = make_trainer(max_steps=25, per_device_train_batch_size=12, arguments={"eval_dataset": rows()})
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    assert after["eval_mean_token_accuracy"] > before["eval_mean_token_accuracy"]
    logged = next(log for log in trainer.state.log_history if "loss" in log)
    assert {"entropy", "mean_token_accuracy", "num_tokens", "grad_norm"} <= logged.keys()
    tokens = sum(
        int(trainer.data_collator([row])["trained"].sum()) + int(trainer.data_collator([row])["prompt_mask"].sum())
        for row in trainer.train_dataset
    )
    assert logged["num_tokens"] == tokens


def test_an_adapter_is_trained_alone(make_trainer, tmp_path):
    trainer = make_trainer(
        model=tiny_policy_path(), arguments={"peft_config": LoraConfig(r=4, target_modules="all-linear")}
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    trainer.save_model()
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}a:{% generation %}{{ m['content'] }}{{ eos_token }}"
    "{% endgeneration %}{% else %}u:{{ m['content'] }}{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def test_formats_of_trl(make_trainer, tokenizer):
    """What is trained of a text, of a prompt and its completion, and of the assistant's turns of a conversation."""
    text = Dataset.from_list([{"text": "abcdef"}])
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ab"}]
    turns = Dataset.from_list([{"messages": [*talk, *talk]}])
    chat = AutoTokenizer.from_pretrained(tiny_policy_path())
    chat.chat_template = TEMPLATE
    for dataset, options, processing_class, expected in (
        (text, {}, tokenizer, "bcdef" + 2 * "<eos>"),
        (turns, {"assistant_only_loss": True}, chat, "ab" + 7 * "<eos>" + "ab" + 4 * "<eos>"),
    ):
        trainer = make_trainer(dataset, arguments={"processing_class": processing_class}, **options)
        documents = Documents(**trainer.data_collator([trainer.train_dataset[0]]))
        assert tokenizer.decode(documents.canvas_ids[documents.trained]) == expected


def test_a_stream(make_trainer):
    def generate():
        yield from rows()

    trainer = make_trainer(IterableDataset.from_generator(generate), arguments={"eval_dataset": rows(5)})
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss_type": "dft"}, "`loss_type`: 'dft' is causal"),
        ({"padding_free": True}, "`padding_free`"),
        ({"pad_to_multiple_of": 8}, "`pad_to_multiple_of`"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor`"),
        ({"packing_strategy": "wrapped"}, "`packing_strategy` must be one of"),
        ({"trust_remote_code": True}, "`trust_remote_code`"),
        ({"model_init_kwargs": {"trust_remote_code": True}}, "`model_init_kwargs`"),
        ({"max_steps": 0}, "`max_steps=0` trains nothing"),
        ({"block_sizes": [3, 8]}, "`block_sizes` must be whole numbers of at least 1 that divide the last one"),
        ({"block_sizes": []}, "`block_sizes`"),
        ({"block_sizes": [2, 4]}, "`block_sizes` must end with the block size of the policy, 8"),
        ({"diffusion_spec": "[]"}, "`diffusion_spec` must be a mapping"),
        ({"diffusion_spec": {"stop_token_ids": []}}, "has no stop tokens"),
        ({"accelerator_config": {"dispatch_batches": True}}, "`dispatch_batches=True` cuts batches into rows"),
        (
            {"per_device_train_batch_size": 0},
            "`per_device_train_batch_size` must be a whole number of at least 1, got 0",
        ),
        (
            {"gradient_accumulation_steps": 0},
            "`gradient_accumulation_steps` must be a whole number of at least 1, got 0",
        ),
        ({"seed": None}, "`seed` must be a whole number of at least 0"),
        ({"max_length": 1}, "`max_length` must be a whole number of at least 2, got 1"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be a number"),
        ({"activation_offloading": True}, "`activation_offloading=True` moves activations from a GPU"),
        ({"include_num_input_tokens_seen": True}, "`include_num_input_tokens_seen`"),
        ({"canvas_length": 16}, "`canvas_length` is for full attention"),
        ({"diffusion_spec": {"attention": "full"}, "block_sizes": [4, 8]}, "`block_sizes` is for block attention"),
    ],
)
def test_options_that_cannot_be_used(make_trainer, options, said):
    with pytest.raises(ValueError, match=said):
        make_trainer(**options)


def test_arguments_that_cannot_be_used(make_trainer):
    for name in ("compute_metrics", "compute_loss_func", "data_collator", "preprocess_logits_for_metrics"):
        with pytest.raises(ValueError, match=f"`{name}` cannot be used with a diffusion policy"):
            make_trainer(arguments={name: lambda *_: None})
    with pytest.raises(TypeError, match="`model` must be a path"):
        DiffusionSFTTrainer(model=3, train_dataset=rows())
    with pytest.raises(TypeError, match="`args` must be a DiffusionSFTConfig"):
        DiffusionSFTTrainer(model=tiny_policy_path(), args=SFTConfig("x", bf16=False), train_dataset=rows())


@pytest.mark.parametrize(
    ("row", "options", "said"),
    [
        ({"input_ids": [5, 1, 6], "labels": [-100, 1, 6]}, {}, r"train_dataset: row 1 holds the mask token \(1\) at position 1"),
        ({"input_ids": [5, 999], "labels": [-100, 999]}, {}, "train_dataset: row 1 holds token 999, but the model's vocabulary"),
        ({"input_ids": [5] * 130, "labels": [5] * 130}, {"max_length": None}, "row 1 has 130 tokens, in whole blocks 136, more than"),
    ],
)  # fmt: skip
def test_documents_that_cannot_be_trained(make_trainer, row, options, said):
    dataset = Dataset.from_list([{"input_ids": [5, 6], "labels": [-100, 6]}, row])
    with pytest.raises(ValueError, match=said):
        make_trainer(dataset, **options)


def test_a_dataset_without_anything_to_train(make_trainer):
    dataset = Dataset.from_list([{"input_ids": [5], "labels": [5]}] * 8)
    with pytest.raises(ValueError, match="train_dataset has no token to train"):
        make_trainer(dataset)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"train_dataset": None}, ValueError, "`train_dataset` is required"),
        ({"train_dataset": Dataset.from_dict({"text": []})}, ValueError, "`train_dataset` is empty"),
        ({"train_dataset": rows().to_iterable_dataset().take(0)}, ValueError, "`train_dataset` is empty"),
        (
            {"train_dataset": Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])},
            ValueError,
            "holds tokens or text to train on",
        ),
        ({"train_dataset": [{"text": "a"}]}, TypeError, "`train_dataset` must be a Dataset or an IterableDataset"),
        ({"eval_dataset": {"a": Dataset.from_dict({"text": []})}}, ValueError, r"`eval_dataset\['a'\]` is empty"),
    ],
)
def test_datasets_without_rows(tmp_path, arguments, error, said):
    options = {"train_dataset": rows(), "args": DiffusionSFTConfig(str(tmp_path), **COMMON), **arguments}
    with pytest.raises(error, match=said):
        DiffusionSFTTrainer(model=tiny_policy_path(), **options)


def test_a_tokenizer_without_an_end_of_text_token(make_trainer):
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path())
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="The tokenizer has no end-of-text token"):
        make_trainer(arguments={"processing_class": tokenizer})


def test_a_row_of_a_stream_that_cannot_be_trained(make_trainer):
    """It is found when it is read, and nothing is trained on it."""

    def generate():
        yield {"input_ids": [5, 1, 6], "labels": [-100, 1, 6]}

    trainer = make_trainer(IterableDataset.from_generator(generate), per_device_train_batch_size=1)
    with pytest.raises(ValueError, match=r"A document holds the mask token \(1\) at position 1"):
        trainer.train()


def test_batches_are_not_cut_into_rows(make_trainer):
    """A process of several reads its own rows of a stream: a row may have several documents, and batches differ in width."""
    stream = rows().to_iterable_dataset()
    assert make_trainer(stream).accelerator.dataloader_config.dispatch_batches is False


def test_training_on_wrong_tokens_is_written_into_the_policy(make_trainer, spec, caplog):
    """A decoder that revises looks at `predicts_visible_tokens`; training without wrong tokens warns that it does not train that."""
    trainer = make_trainer(weighting="mean", max_corruption=0.1)
    assert get_spec(trainer.model.config).predicts_visible_tokens
    assert "it may forget it" not in caplog.text
    make_trainer(diffusion_spec={"predicts_visible_tokens": True})
    assert "it may forget it" in caplog.text


def test_lengths_that_would_be_learnt_wrong(make_trainer, caplog):
    """Answers without a stop token; and canvases that show the length of the answer (full attention)."""
    make_trainer(Dataset.from_list([{"input_ids": [5, 6], "labels": [-100, 6]}] * 4))
    assert "the policy does not learn to end an answer" in caplog.text
    full = {"attention": "full", "block_size": 4, "block_origin": "response"}
    make_trainer(diffusion_spec=full)
    assert "Set `canvas_length`" in caplog.text
    caplog.clear()
    trainer = make_trainer(diffusion_spec=full, canvas_length=18)
    assert not caplog.text
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["canvas_lengths"].tolist() == [20] * 4 and batch["trained"].all()


def test_turns_do_not_make_long_rows(make_trainer, tokenizer):
    """A conversation has a document for each turn, with all turns before it as its prompt. No row of the forward pass is longer
    than the longest of them, and the loss is the same."""
    ids, labels = [], []
    for turn in range(6):
        ids += [5 + turn] * 6 + [tokenizer.eos_token_id]
        labels += [-100] * 4 + ids[-3:]
    trainer = make_trainer(
        Dataset.from_list([{"input_ids": ids, "labels": labels}] * 4), per_device_train_batch_size=1
    )
    documents = Documents(**trainer.data_collator([trainer.train_dataset[0]]))
    assert len(documents.packs) == 6
    seed = derive_seed(trainer.args.seed, SUPERVISED, 0, 0)
    layout = pack(
        documents.trajectories(), trainer.spec, document_states(documents, trainer.spec, seed, trainer.masks)
    )
    packs = rows_to_join(layout, 6)
    joined = join_rows(layout, packs)
    assert joined.input_ids.shape[1] == layout.allowed.valid.sum(1).max()
    assert joined.allowed.valid.sum() == layout.allowed.valid.sum()
    assert 1 < len(joined.input_ids) < 6
    with torch.no_grad():
        apart = -(score(trainer.model, layout, trainer.spec)[0] * layout.weights).sum()
        loss = trainer.compute_loss(trainer.model, vars(documents))
    assert loss.item() == pytest.approx(float(apart) / int(documents.trained.sum()), rel=1e-5)


@pytest.mark.parametrize("name", ["cp_enabled", "sp_enabled"])
def test_rows_are_not_cut_among_processes(name):
    config = SimpleNamespace(**{"cp_enabled": False, "sp_enabled": False, name: True})
    with pytest.raises(ValueError, match="cut rows among processes"):
        check_parallel(SimpleNamespace(parallelism_config=config))


def test_tokens_that_come_with_a_chat_template(tmp_path, make_trainer, spec):
    """Tokens that TRL adds for the template of another tokenizer can be trained, also where the tokenizer had no token before."""
    other = AutoTokenizer.from_pretrained(tiny_policy_path())
    other.add_tokens(["<turn>"])
    other.chat_template = TEMPLATE
    other.save_pretrained(tmp_path / "other")
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ab<turn>"}]
    trainer = make_trainer(
        Dataset.from_list([{"prompt": talk[:1], "completion": talk[1:]}] * 4),
        make_policy(spec, vocab_size=len(other) + 9, pad_token_id=other.pad_token_id),
        chat_template_path=str(tmp_path / "other"),
        arguments={"processing_class": AutoTokenizer.from_pretrained(tiny_policy_path())},
    )
    new = trainer.processing_class.convert_tokens_to_ids("<turn>")
    assert new in trainer.train_dataset[0]["labels"]
    assert not trainer.spec.is_absent(new)
    assert get_spec(trainer.model.config) == trainer.spec


@pytest.mark.parametrize("labels", [[-100, -100], None])
def test_a_stream_without_anything_to_train(make_trainer, labels):
    """Neither a stream without a trained token nor one of which `max_length` leaves nothing ends without a word."""
    row = {"input_ids": [5, 6], "labels": labels} if labels else {"prompt": "abcdefghijk", "completion": "abc"}
    trainer = make_trainer(Dataset.from_list([row] * 4).to_iterable_dataset(), max_length=5, max_steps=1)
    with pytest.raises(ValueError, match="Nothing was trained"):
        trainer.train()


def test_attention_implementations(make_trainer, spec, tokenizer, tmp_path):
    """FlexAttention is used, as for RL; one that knows causal attention only is refused before weights are loaded."""
    make_policy(spec, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "start")
    options = {"model": str(tmp_path / "start"), "max_steps": 1}
    losses = []
    for name in ("sdpa", "flex_attention", "eager"):
        trainer = make_trainer(**options, model_init_kwargs={"attn_implementation": name})
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    (tmp_path / "start" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2' cannot run the attention mask"):
        make_trainer(**options, model_init_kwargs={"attn_implementation": "flash_attention_2"})


def test_a_policy_on_several_devices(make_trainer, spec, tokenizer):
    model = make_policy(spec, vocab_size=len(tokenizer))
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with pytest.raises(ValueError, match="The policy is spread over 2 devices"):
        make_trainer(model=model)


def test_a_mask_of_completions_needs_a_word(make_trainer):
    """TRL would leave it out, and train on prompts, too."""
    dataset = Dataset.from_list([{"input_ids": [5, 6, 7, 2], "completion_mask": [0, 0, 1, 1]}] * 4)
    with pytest.raises(ValueError, match="`train_dataset` has a `completion_mask`"):
        make_trainer(dataset)
    for told, labels in ((True, [-100, -100, 7, 2]), (False, [5, 6, 7, 2])):
        assert make_trainer(dataset, completion_only_loss=told).train_dataset[0]["labels"] == labels
