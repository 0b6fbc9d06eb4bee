"""Collecting: what is written, going on after an interruption, and what is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pyarrow.parquet as parquet
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from tests.closeness import assert_close
from tests.conftest import make_policy
from tests.offline.conftest import codes, length, prompt_dataset, run_collect
from trl_diffusion import DecodingConfig, decode, load_trajectories
from trl_diffusion.seeds import derive_seed
from trl_diffusion.trajectories.dataset import check_trajectories, from_rows, reward_columns, to_rows
from trl_diffusion.trajectories.fingerprint import fingerprint_policy, fingerprint_tokenizer


def table_of(path):
    return load_trajectories(path).to_list()


def test_what_is_written(collection, start, tokenizer, char_spec):
    dataset = load_trajectories(collection)
    assert len(dataset) == 10 and sorted(dataset["row"]) == list(range(10))
    assert reward_columns(dataset) == ["codes", "length"]
    check_trajectories(dataset, char_spec, len(tokenizer), fingerprint_tokenizer(tokenizer))
    policy = AutoModelForCausalLM.from_pretrained(start)
    source = prompt_dataset()
    for row in dataset:
        number = row["row"]
        assert row["prompt"] == source[number]["prompt"] and row["puzzle"] == source[number]["puzzle"]
        assert row["policy_fingerprint"] == fingerprint_policy(start) == fingerprint_policy(policy)
        # Every response is the one that decoding gives for its seed, alone.
        expected = decode(
            policy,
            [row["prompt_ids"]] * 4,
            DecodingConfig(14, 1.0, tokens_per_step=2),
            seeds=[derive_seed(5, number, response) for response in range(4)],
        )
        batch = from_rows([(row, response) for response in range(4)], char_spec)
        width = batch.canvas_ids.shape[1]
        assert torch.equal(batch.canvas_lengths, expected.canvas_lengths)
        canvas = torch.arange(width) < batch.canvas_lengths[:, None]  # what fills a row up is not the same
        assert torch.equal(batch.canvas_ids[canvas], expected.canvas_ids[:, :width][canvas])
        assert torch.equal(batch.steps, expected.steps[:, :width])
        assert torch.equal(batch.completion_lengths, expected.completion_lengths)
        assert_close(batch.logps, expected.logps[:, :width])
        texts = tokenizer.batch_decode(batch.completions(), skip_special_tokens=True)
        assert row["reward_codes"] == pytest.approx(codes(texts), rel=1e-6)
        assert row["reward_length"] == length(texts)


def test_rows_survive_the_way_there_and_back(collection, char_spec):
    rows = table_of(collection)
    batch = from_rows([(row, response) for row in rows for response in range(4)], char_spec)
    from trl_diffusion.trajectories.dataset import Provenance

    provenance = Provenance(
        rows[0]["policy_fingerprint"], rows[0]["tokenizer_fingerprint"], char_spec, json.loads(rows[0]["decoding"])
    )
    again = to_rows(batch, char_spec, 4, provenance)
    for before, after in zip(rows, again, strict=True):
        assert {name: before[name] for name in after} == after


def test_the_card_counts(collection):
    card = (collection / "README.md").read_text()
    rows = table_of(collection)
    tokens = sum(sum(row["completion_lengths"]) for row in rows)
    assert f"40 responses, {tokens} tokens, in 4 shards" in card
    assert rows[0]["policy_fingerprint"] in card and rows[0]["tokenizer_fingerprint"] in card
    mean = sum(sum(row["reward_codes"]) for row in rows) / 40
    assert f"| `codes` | {mean:.4f} | 40 |" in card
    given = [value for row in rows for value in row["reward_length"] if value is not None]
    assert f"| `length` | {sum(given) / len(given):.4f} | {len(given)} |" in card and len(given) < 40
    assert "tokens_per_step | `2`" in card


def test_an_interrupted_run_goes_on(collection, start, tokenizer, tmp_path):
    """Missing shards are made, the others are not touched, and the result is the one of an uninterrupted run."""
    directory = run_collect(start, tmp_path / "run", tokenizer, batch_size=5)  # another batch size, the same responses
    for expected, found in zip(table_of(collection), table_of(directory), strict=True):
        assert {k: v for k, v in expected.items() if k != "event_logps"} == {
            k: v for k, v in found.items() if k != "event_logps"
        }
    shards = sorted((directory / "data").glob("*.parquet"))
    times = {shard: shard.stat().st_mtime_ns for shard in shards}
    before = shards[2].read_bytes()
    shards[2].unlink()
    (directory / "README.md").unlink()
    (directory / "data" / ".unfinished-1-shard-00002.parquet").write_bytes(before[:100])
    with pytest.raises(ValueError, match="3 of 4 shards"):
        load_trajectories(directory)
    assert len(load_trajectories(directory, allow_partial=True)) == 7
    run_collect(start, directory, tokenizer, batch_size=5)
    assert shards[2].read_bytes() == before and (directory / "README.md").exists()
    assert not list((directory / "data").glob(".unfinished*"))
    assert all(shard.stat().st_mtime_ns == times[shard] for shard in shards if shard != shards[2])


def test_another_collection_is_not_overwritten(collection, start, tokenizer, tmp_path):
    before = {file: file.read_bytes() for file in collection.rglob("*") if file.is_file()}
    for options, named in (
        ({"seed": 6}, "seed"),
        ({"num_responses": 5}, "num_responses"),
        ({"decoding": DecodingConfig(14, 0.5, tokens_per_step=2)}, "decoding"),
        ({"dataset": prompt_dataset(9)}, "num_prompts"),
        (
            {"decoding": DecodingConfig(14, tokens_per_step=2)},
            "4 responses to a prompt are all the same at temperature 0",
        ),
        ({"decoding": DecodingConfig(14, 1.0, top_k=1, tokens_per_step=2)}, "are all the same with `top_k=1`"),
        ({"reward_funcs": codes}, "rewards"),
    ):
        with pytest.raises(ValueError, match=named):
            run_collect(start, collection, tokenizer, **options)
    assert before == {file: file.read_bytes() for file in collection.rglob("*") if file.is_file()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not empty"):
        run_collect(start, tmp_path / "mine", tokenizer)
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_process_of_another_machine_needs_the_same_directory(start, tokenizer, tmp_path, monkeypatch):
    """It does not see what the first process has written. Nothing is answered before this is known."""
    second = SimpleNamespace(
        is_main_process=False, num_processes=2, device="cpu"
    )  # fmt: skip
    monkeypatch.setattr("trl_diffusion.offline.collection.PartialState", lambda: second)
    with pytest.raises(ValueError, match="is not the directory that the first process writes to"):
        run_collect(start, tmp_path / "run", tokenizer)
    assert not list(tmp_path.iterdir())


def test_a_damaged_shard_is_named(collection, start, tokenizer, tmp_path):
    directory = run_collect(start, tmp_path / "run", tokenizer)
    shard = directory / "data" / "shard-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(ValueError, match="shard-00001.parquet"):
        load_trajectories(directory)
    with pytest.raises(ValueError, match="shard-00001.parquet"):
        run_collect(start, directory, tokenizer)
    (directory / "data" / "shard-00002.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read"):
        load_trajectories(directory)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_trajectories(tmp_path / "nowhere")


def bad_reward(completions, **kwargs):
    return [1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": Dataset.from_list([{"text": "a"}])}, "prompt"),
        ({"dataset": Dataset.from_dict({"prompt": []})}, "empty"),
        ({"dataset": Dataset.from_list([{"prompt": "sudoku"}, {"prompt": ""}])}, "Row 1"),
        ({"dataset": Dataset.from_list([{"prompt": "sudoku", "row": 3}])}, "row"),
        ({"dataset": Dataset.from_list([{"prompt": "sudoku " * 60}])}, "context"),
        ({"reward_funcs": []}, "reward"),
        ({"reward_funcs": [codes, codes]}, "different names"),
        ({"num_responses": 0}, "num_responses"),
        ({"rows_per_shard": 0}, "rows_per_shard"),
    ],
)
def test_bad_input_leaves_nothing_behind(start, tokenizer, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run_collect(start, tmp_path / "run", tokenizer, **options)
    assert not (tmp_path / "run").exists()


def test_a_reward_function_that_fails_costs_its_shard_only(start, tokenizer, tmp_path):
    calls = []

    def codes(completions, **kwargs):  # noqa: F811  (the name counts)
        calls.append(len(completions))
        if len(calls) == 3:
            raise RuntimeError("the judge is ill")
        return [1.0] * len(completions)

    with pytest.raises(RuntimeError, match="ill"):
        run_collect(start, tmp_path / "run", tokenizer, reward_funcs=codes)
    assert len(list((tmp_path / "run" / "data").glob("*.parquet"))) == 2
    run_collect(start, tmp_path / "run", tokenizer, reward_funcs=codes)
    assert len(table_of(tmp_path / "run")) == 10
    with pytest.raises(ValueError, match="bad_reward.*returned 1 rewards"):
        run_collect(start, tmp_path / "other", tokenizer, reward_funcs=bad_reward)


def test_conversations(start, tokenizer, tmp_path):
    import copy

    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    seen = []

    def role(completions, prompts, **kwargs):
        seen.extend(completions)
        return [float(completion[0]["role"] == "assistant") for completion in completions]

    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": f"sudoku {i}"}]} for i in range(4)])
    directory = run_collect(start, tmp_path / "run", chatty, dataset=dataset, reward_funcs=role)
    rows = table_of(directory)
    assert rows[2]["prompt"] == [{"role": "user", "content": "sudoku 2"}] and rows[2]["reward_role"] == [1.0] * 4
    assert tokenizer.decode(rows[2]["prompt_ids"]).strip() == "sudoku 2"


def test_shards_hold_plain_types(collection):
    schema = parquet.read_schema(collection / "data" / "shard-00000.parquet")
    assert str(schema.field("event_tokens").type) == "list<element: list<element: int32>>"
    assert str(schema.field("event_logps").type) == "list<element: list<element: float>>"


def test_the_fingerprint_of_a_revision(start, char_spec, monkeypatch, tmp_path):
    """A stand-in for the hub, with another policy in each revision."""
    make_policy(char_spec, seed=7).save_pretrained(tmp_path)
    revisions = {None: start, "new": tmp_path}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda path, allow_patterns, revision=None: revisions[revision]
    )
    assert fingerprint_policy("user/policy") == fingerprint_policy(start)
    assert (
        fingerprint_policy("user/policy", revision="new") == fingerprint_policy(tmp_path) != fingerprint_policy(start)
    )


def test_fingerprints(start, tokenizer, char_spec, tmp_path):
    from peft import LoraConfig, get_peft_model

    policy = AutoModelForCausalLM.from_pretrained(start)
    own = fingerprint_policy(policy)
    policy.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert fingerprint_policy(tmp_path / "sharded") == own
    policy.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    half = fingerprint_policy(tmp_path / "half")
    assert half != own
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    assert fingerprint_policy(loaded) == half
    adapted = get_peft_model(loaded, LoraConfig(target_modules="all-linear"))
    assert fingerprint_policy(adapted) == half  # it changes nothing yet
    with torch.no_grad():
        next(p for name, p in adapted.named_parameters() if "lora_B" in name).add_(0.1)
    assert fingerprint_policy(adapted) != half
    (tmp_path / "empty").mkdir()
    assert fingerprint_policy(tmp_path / "empty") is None
    assert fingerprint_policy(tmp_path, subfolder="half") == half
    other = type(tokenizer).from_pretrained(start)
    assert fingerprint_tokenizer(other) == fingerprint_tokenizer(tokenizer)
    other.add_tokens(["another"])
    assert fingerprint_tokenizer(other) != fingerprint_tokenizer(tokenizer)


async def later(completions, **kwargs) -> list[float | None]:
    """Asynchronous, and not always applicable."""
    return [None if len(text) % 2 else float("nan") if len(text) % 3 else float(len(text)) for text in completions]


def test_every_kind_of_reward_that_trains_is_collected(start, tmp_path, tokenizer):
    path = run_collect(start, tmp_path / "out", tokenizer, prompt_dataset(2), reward_funcs=[later, codes])
    rows = table_of(path)
    assert {name for name in rows[0] if name.startswith("reward_")} == {"reward_later", "reward_codes"}
    for row in rows:
        for index, reward in enumerate(row["reward_later"]):
            number = row["completion_lengths"][index]
            assert reward is None or (reward % 6 == 0 and reward <= number)
