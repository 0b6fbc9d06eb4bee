"""Collecting from a server stores what collecting in this process stores, whatever happens to the server."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
from datasets import Dataset

from tests.closeness import assert_close
from tests.processes import HANGS
from tests.serving.conftest import SETTINGS, serving, wait_until
from tests.serving.foreign import foreign
from tests.serving.jobs import free_port, served
from trl_diffusion import DecodingConfig, collect, load_trajectories
from trl_diffusion.commands import collect as command
from trl_diffusion.commands.iterate import Rounds
from trl_diffusion.offline.endpoint import Endpoint
from trl_diffusion.offline.from_server import collect_from_server
from trl_diffusion.rewards import sudoku
from trl_diffusion.trajectories.dataset import check_trajectories


PROMPTS = Dataset.from_list([{**row, "prompt": sudoku.prompt(row["puzzle"])} for row in sudoku.generate(6, seed=2)])
SIZES = {"num_responses": 3, "rows_per_shard": 2, "seed": 11, "disable_tqdm": True}


def from_server(url: str, policy, output_dir, **options):
    return collect_from_server(
        Endpoint(url, patience=options.pop("patience", HANGS)), policy.tokenizer, policy.spec, policy.model.config, PROMPTS,
        sudoku.sudoku_units, output_dir, 17, **{**SIZES, "concurrency": 4, **options},
    )  # fmt: skip


@pytest.fixture(scope="module")
def expected(embedded, tmp_path_factory) -> Path:
    """What is collected in this process."""
    config = DecodingConfig(17, 1.0, **SETTINGS)
    directory = tmp_path_factory.mktemp("expected") / "collection"
    return collect(embedded.model, embedded.tokenizer, PROMPTS, sudoku.sudoku_units, directory, config, **SIZES)


def assert_same_collection(found: Path, wanted: Path) -> None:
    plans = [json.loads((one / "collection.json").read_text()) for one in (found, wanted)]
    assert {**plans[0], "policy": ""} == {**plans[1], "policy": ""}
    files = [sorted(path.name for path in (one / "data").iterdir()) for one in (found, wanted)]
    assert files[0] == files[1] and len(files[0]) == 3
    for name in files[0]:
        rows, others = (parquet.read_table(one / "data" / name).to_pylist() for one in (found, wanted))
        for row, other in zip(rows, others, strict=True):
            for values, wanted_values in zip(row.pop("event_logps"), other.pop("event_logps"), strict=True):
                assert_close(torch.tensor(values), torch.tensor(wanted_values))
            assert row == other


def test_the_same_as_in_this_process(client, embedded, expected, tmp_path, capsys):
    assert_same_collection(from_server(client.url, embedded, tmp_path / "one"), expected)
    words = ["--server", client.url.removesuffix("/v1"), "--output_dir", str(tmp_path / "two"), "--num_responses", "2",
             "--train_size", "4", "--eval_size", "1", "--served_model", "tiny"]  # fmt: skip
    command.main(words)
    assert "trl-diffusion train --trajectories" in capsys.readouterr().out
    stored = load_trajectories(tmp_path / "two")
    assert len(stored) == 4 and len(stored[0]["canvas_lengths"]) == 2 and "reward_sudoku_units" in stored.column_names
    with pytest.raises(SystemExit) as end:
        command.main([*words[:4], "--served_model", "another"])
    assert end.value.code == 2 and "has no model 'another'; there are ['tiny']" in capsys.readouterr().err


def test_a_server_that_is_killed_in_the_middle(embedded, expected, tmp_path):
    """And started again, on the same port: the collection waits, and is the same as one without an interruption."""
    port, words = free_port(), ["--max_new_tokens", "24", "--tokens_per_step", "2", "--max_batch", "1"]
    killed = threading.Event()
    with served(tmp_path / "first", words, port) as (process, client):

        def kill():
            wait_until(lambda: list((tmp_path / "found" / "data").glob("shard-*")))
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed.set()

        killer = threading.Thread(target=kill)
        killer.start()
        again = []

        def restart():
            assert killed.wait(HANGS)
            with served(tmp_path / "second", words, port):
                again.append(True)
                assert done.wait(HANGS)

        done, restarter = threading.Event(), threading.Thread(target=restart)
        restarter.start()
        try:
            found = from_server(client.url, embedded, tmp_path / "found", concurrency=2)
        finally:
            done.set()
            killer.join()
            restarter.join()
    assert again and killed.is_set()
    assert_same_collection(found, expected)


def test_another_policy_after_the_restart(client, embedded, tmp_path):
    """What another policy answers is not mixed in."""
    directory = tmp_path / "found"
    with serving(embedded, settings={"tokens_per_step": 1}) as (other, _):
        endpoint = Endpoint(client.url)
        find = endpoint.find_model
        endpoint.find_model = lambda name: (find(name), setattr(endpoint, "url", other.url))[0]
        with pytest.raises(
            ValueError, match="row 0 cannot be used .*the policy or the settings of the server have changed"
        ):
            collect_from_server(
                endpoint, embedded.tokenizer, embedded.spec, embedded.model.config, PROMPTS, sudoku.sudoku_units, directory, 17,
                **SIZES,
            )  # fmt: skip
    assert not list(directory.glob("data/shard-*"))
    with pytest.raises(ValueError, match="is denoised in another way"):
        collect_from_server(
            Endpoint(client.url), embedded.tokenizer, embedded.spec.replace(block_size=4), embedded.model.config, PROMPTS,
            sudoku.sudoku_units, directory, 17, **SIZES,
        )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"refuses a request \(400: `max_tokens`: must be a whole number from 1 to 24"
    ):
        collect_from_server(
            Endpoint(client.url), embedded.tokenizer, embedded.spec, embedded.model.config, PROMPTS, sudoku.sudoku_units,
            tmp_path / "long", 25, **SIZES,
        )  # fmt: skip


def test_a_server_of_somebody_else(embedded, tmp_path, caplog):
    """Text without an order. What passes is waited for: 429, 503, 500, a connection that is closed."""
    asked, troubles = [], [429, None, 503, 500]

    def answer(body):
        if troubles:
            return troubles.pop()
        if isinstance(body["prompt"], list):
            return 400
        asked.append(body)
        return {"text": f"{body['seed'] % 1000}", "finish_reason": "stop" if body["seed"] % 2 else "length"}

    with foreign(answer) as url:
        directory = from_server(url, embedded, tmp_path / "found", concurrency=2)
    assert "does not accept token ids" in caplog.text
    stored = load_trajectories(directory)
    check_trajectories(stored, embedded.spec, embedded.model.config.vocab_size)
    stops = embedded.spec.stop_token_ids
    by_prompt = {prompt: {} for prompt in PROMPTS["prompt"]}
    for body in asked:
        assert 0 <= body["seed"] < 2**31 and "return_denoising" not in body and body["temperature"] == 1.0
        by_prompt[body["prompt"]][body["seed"]] = f"{body['seed'] % 1000}"
    for row in stored:
        assert row["event_logps"] is None and row["policy_fingerprint"] is None
        assert json.loads(row["decoding"])["order"] is None
        texts = embedded.decode(row["event_tokens"])
        assert sorted(texts) == sorted(by_prompt[row["prompt"]].values())
        for text, tokens in zip(texts, row["event_tokens"], strict=True):
            (seed,) = (seed for seed, one in by_prompt[row["prompt"]].items() if one == text)
            assert (tokens[-1] in stops) == bool(seed % 2)
    assert "The order in which their tokens were written is not known" in (directory / "README.md").read_text()


def test_a_greedy_server_is_told(embedded, tmp_path, caplog):
    with foreign(lambda body: {"text": "12", "finish_reason": "stop"}) as url:
        from_server(url, embedded, tmp_path / "found")
    told = [one.message for one in caplog.records if "the same" in one.message]
    assert told == [
        "All 3 answers to each of 6 prompts are the same, although the temperature is 1: does the server decode greedily? There is "
        "nothing to learn from such groups."
    ]


def test_what_does_not_pass(embedded, tmp_path):
    for answer, message in (
        (lambda body: 401, r"refuses a request \(401: not now\)"),
        (lambda body: {"text": "", "finish_reason": "length"}, "row 0 cannot be used .*it is empty"),
        (lambda body: {"words": "x"}, "row 0 cannot be used"),
        (lambda body: {"text": "<mask>" if "<mask>" in embedded.tokenizer.get_vocab() else embedded.tokenizer.mask_token}, "the mask token"),
    ):  # fmt: skip
        with foreign(answer) as url, pytest.raises(ValueError, match=message):
            from_server(url, embedded, tmp_path / "found")
    with foreign(lambda body: 1, ("a", "b")) as url, pytest.raises(ValueError, match="has several models"):
        from_server(url, embedded, tmp_path / "found")
    with pytest.raises(ConnectionError, match="did not answer for 0.2 seconds .*Give the same command again"):
        from_server(f"http://127.0.0.1:{free_port()}", embedded, tmp_path / "found", patience=0.2)
    with (
        foreign(lambda body: b"<html>") as url,
        pytest.raises(ValueError, match="answers b'<html>', which is not a JSON"),
    ):
        from_server(url, embedded, tmp_path / "found")
    with pytest.raises(ValueError, match="is like http://"):
        Endpoint("127.0.0.1:8000")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--concurrency", "2"], "`--concurrency` is for the answers of a server"),
        (["--server", "http://x", "--responses", "y.jsonl"], "Give one of them"),
        (["--server", "http://x", "--strategy", "threshold"], "`--strategy`: the server decodes"),
        (["--server", "http://x", "--adapter_name_or_path", "y"], "`--adapter_name_or_path`: the server has the weights"),
        (["--server", "http://x", "--batch_size", "8"], "`--batch_size`: the server decodes. Set `--concurrency`"),
        (["--server", "http://x", "--dtype", "bfloat16"], "`--dtype` is for weights, and with `--server` or `--responses` none"),
        (["--responses", "y.jsonl", "--task", "sudoku"], "`--task`: the prompts are in y.jsonl"),
        (["--responses", "y.jsonl", "--temperature", "0.5"], "`--temperature`: the responses are in y.jsonl already"),
        (["--responses", "y.jsonl", "--strategy", "entropy"], "`--strategy`: the responses are in y.jsonl already"),
        (["--responses", "y.jsonl", "--num_responses", "4"], "`--num_responses`: the responses are in y.jsonl already"),
        (["--responses", "y.jsonl", "--load_in_8bit"], "`--load_in_8bit` is for weights"),
        (["--server", "ftp://x"], "is like http://"),
        (["--server", "http://x", "--api_key_env", "THERE_IS_NO_SUCH_KEY"], "`--api_key_env`: the variable"),
    ],
)  # fmt: skip
def test_wrong_options(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        command.main([*words, "--output_dir", str(tmp_path / "found")])
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["server", "responses"])
def test_rounds_collect_with_their_own_policy(name):
    with pytest.raises(ValueError, match=f"`collect` has `{name}`: a round trains on responses of its own policy"):
        Rounds(output_dir="outputs/rounds", collect={name: "x"})
