"""The command that shows a stored response."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from html import escape
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from matplotlib.image import imread
from transformers import AutoTokenizer

from tests.conftest import SPECS, make_policy, make_prompts
from trl_diffusion import DecodingConfig, decode, tiny_policy_path
from trl_diffusion.commands.view import main
from trl_diffusion.trajectories.dataset import Provenance, to_rows
from trl_diffusion.trajectories.fingerprint import fingerprint_tokenizer
from trl_diffusion.trajectories.trajectory import global_steps, response_blocks


PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_policy_path())


def make_batch(spec, lengths=(3, 13), responses: int = 2, tokens_per_step: int = 2):
    prompts = [prompt for prompt in make_prompts(lengths) for _ in range(responses)]
    config = DecodingConfig(20, tokens_per_step=tokens_per_step, temperature=1.0)
    return decode(make_policy(spec, num_hidden_layers=3), prompts, config, seeds=list(range(len(prompts))))


def write_dataset(directory: Path, tokenizer, spec, batch, /, recorded: bool = True, **plan) -> list[dict]:
    """Rows of two responses each, in the stored format."""
    provenance = Provenance("0" * 32, fingerprint_tokenizer(tokenizer), spec, {"decoder": "loop", "temperature": 0.5})
    rows = to_rows(batch, spec, 2, provenance, recorded)
    for number, row in enumerate(rows):
        row.update(row=number, prompt="?", reward_solved=[1.0, 0.25], reward_rare=[None, 0.5])
    (directory / "data").mkdir(parents=True)
    parquet.write_table(pa.Table.from_pylist(rows), directory / "data" / "shard-00000.parquet")
    if plan:
        (directory / "collection.json").write_text(json.dumps(plan))
    return rows


def steps_of(batch, spec, row: int) -> list[int]:
    """Denoising step of each position, counted through all blocks."""
    one = batch.select(torch.tensor([row]))
    length = int(one.canvas_lengths[0])
    return global_steps(response_blocks(spec, one.prompt_lengths, length), one.steps[:, :length])[0].tolist()


def test_command_writes_pictures_and_numbers(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spec = SPECS["block-from-sequence"]
    batch = make_batch(spec)
    plan = dict(tokenizer=tiny_policy_path(), policy="some/policy", num_shards=7)
    write_dataset(tmp_path / "made", tokenizer, spec, batch, **plan)
    assert main(["made", "1"]) == 0
    height, width, _ = imread(tmp_path / "trajectory_1_0.png").shape
    assert min(height, width) > 100
    out, err = capsys.readouterr()
    assert err == ""
    counted = int(batch.completion_lengths[2])
    steps = len(set(steps_of(batch, spec, 2)[:counted]))
    mean = float(batch.logps[2, :counted].exp().mean())
    prompt = batch.prompt_ids[2][batch.prompt_mask[2] > 0].tolist()
    assert out.startswith(f"trajectory_1_0.png\nprompt: {tokenizer.decode(prompt)}\ntext: ")
    assert tokenizer.decode(batch.completions()[2], skip_special_tokens=True) in out
    assert out.endswith(
        f"{counted} tokens, {steps} steps, {counted / steps:.2f} tokens per step, mean probability {mean:.3f}, "
        "reward solved 1, reward rare n/a\n"
    )
    assert main(["made", "0", "--response", "1", "--output", "deep/page.html"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("reward solved 0.25, reward rare 0.5")
    page = (tmp_path / "deep" / "page.html").read_text(encoding="utf-8")
    for part in (
        "<h1>row 0, response 1</h1>",
        f">{escape(tokenizer.decode(batch.completions()[1]))}<",
        "<dt>reward solved</dt><dd>0.25 (mean of 2 responses: 0.625)</dd>",
        "<dt>reward rare</dt><dd>0.5</dd>",
        f"<dt>policy</dt><dd>some/policy, fingerprint {'0' * 32}</dd>",
        "<dt>decoding</dt><dd>temperature 0.5</dd>",
        "<h3>response 0</h3>\n<p>solved 1, rare does not apply, ",
    ):
        assert part in page, part


def test_command_finds_the_tokenizer(tokenizer, tmp_path, capsys):
    spec = SPECS["block-from-sequence"]
    output = ["--output", str(tmp_path / "one.html")]
    made = tmp_path / "made"
    write_dataset(made, tokenizer, spec, make_batch(spec))
    assert main([str(made), "0", *output]) == 2
    assert "Pass --tokenizer PATH" in capsys.readouterr().err
    assert main([str(made), "0", *output, "--tokenizer", tiny_policy_path()]) == 0
    tokenizer.save_pretrained(made / "tokenizer")
    assert main([str(made), "0", *output]) == 0
    assert capsys.readouterr().err == ""
    (made / "collection.json").write_text(json.dumps({"tokenizer": str(tmp_path / "gone"), "num_shards": 1}))
    assert main([str(made), "0", *output]) == 2
    assert str(tmp_path / "gone") in capsys.readouterr().err
    other = AutoTokenizer.from_pretrained(tiny_policy_path())
    other.add_tokens(["more"])
    other.save_pretrained(tmp_path / "other")
    assert main([str(made), "0", *output, "--tokenizer", str(tmp_path / "other")]) == 0
    assert "made with another tokenizer" in capsys.readouterr().err


def test_command_without_recorded_probabilities(tokenizer, tmp_path, capsys):
    spec = SPECS["block-from-sequence"]
    write_dataset(tmp_path, tokenizer, spec, make_batch(spec), recorded=False, tokenizer=tiny_policy_path())
    for name in ("one.png", "one.html"):
        assert main([str(tmp_path), "0", "--output", str(tmp_path / name)]) == 0
        assert "mean probability not recorded" in capsys.readouterr().out
    assert (tmp_path / "one.png").read_bytes().startswith(PNG)
    page = (tmp_path / "one.html").read_text(encoding="utf-8")
    assert 'class="t p"' in page and 'class="t p1' not in page and "with probability not recorded" in page


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["made", "2"], "There is no row 2 in made: it has 2 (0 to 1)."),
        (["made", "-1"], "There is no row -1"),
        (["made", "0", "--response", "2"], "There is no response 2 in row 0: it has 2 (0 to 1)."),
        (["made", "0", "--response", "-1"], "There is no response -1"),
        (["nowhere", "0"], "There is no directory nowhere. Give one that `collect` has written"),
        ([".", "0"], "There are no trajectories in ."),
        (["made", "0", "--output", "one.pdf"], "--output must end in .png or .html, got one.pdf."),
        (["made", "0", "--output", "made"], "--output must end in .png or .html, got made."),
        (["made", "0", "--tokenizer", "nowhere"], "The tokenizer nowhere cannot be loaded"),
        (["broken", "0"], "shard-00000.parquet cannot be read"),
        (["prompts", "0"], "prompts does not hold trajectories: it lacks the columns"),
        (["newer", "0"], "Row 0 of newer has format version 99"),
        (["damaged", "0"], "Row 0, response 0 of damaged is damaged"),
        (["made", "0", "--output", "made/data/shard-00000.parquet/one.html"], "shard-00000.parquet"),
    ],
)
def test_command_says_what_is_wrong(arguments, problem, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spec = SPECS["block-from-sequence"]
    rows = write_dataset(tmp_path / "made", tokenizer, spec, make_batch(spec), tokenizer=tiny_policy_path())
    if arguments[0] in ("broken", "prompts", "newer", "damaged"):
        shutil.copytree("made", arguments[0])
        shard = Path(arguments[0], "data", "shard-00000.parquet")
        if arguments[0] == "broken":
            shard.write_bytes(shard.read_bytes()[:100])
        else:
            rows[0]["event_positions"][0][0] = 1000
            changed = {
                "prompts": [{"prompt": "?"}],
                "newer": [{**row, "format_version": 99} for row in rows],
                "damaged": rows,
            }
            parquet.write_table(pa.Table.from_pylist(changed[arguments[0]]), shard)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and problem in err
    assert not list(tmp_path.glob("*.png"))


def test_command_needs_matplotlib_for_a_png_only(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spec = SPECS["block-from-sequence"]
    write_dataset(tmp_path / "made", tokenizer, spec, make_batch(spec), tokenizer=tiny_policy_path())
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["made", "0"]) == 2
    assert "pip install 'trl-diffusion[viz]'" in capsys.readouterr().err
    assert main(["made", "0", "--output", "one.html"]) == 0


def test_command_refuses_a_huge_png(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spec = SPECS["block-from-sequence"]
    batch = make_batch(spec, (8,))
    times = 20
    long = dataclasses.replace(
        batch,
        canvas_ids=batch.canvas_ids.repeat(1, times),
        steps=batch.steps.repeat(1, times),
        logps=batch.logps.repeat(1, times),
        canvas_lengths=torch.full_like(batch.canvas_lengths, batch.canvas_ids.shape[1] * times),
    )
    write_dataset(tmp_path / "made", tokenizer, spec, long, tokenizer=tiny_policy_path())
    assert main(["made", "0"]) == 2
    assert "too many for a PNG" in capsys.readouterr().err
    assert main(["made", "0", "--output", "one.html"]) == 0


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    help_text = capsys.readouterr().out
    assert help_text.count("trl-diffusion view DATASET ROW") >= 4 and "--tokenizer" in help_text
