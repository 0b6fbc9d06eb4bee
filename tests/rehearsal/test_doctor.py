"""The doctor: what it says about the machine, and a trial of a few layers beside what arithmetic says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import SPECS, make_policy
from trl_diffusion import DecodingConfig, cli
from trl_diffusion.commands import doctor
from trl_diffusion.decoding.decode import decode
from trl_diffusion.plan.simulate import Workload
from trl_diffusion.rehearsal import machine, smoke
from trl_diffusion.rehearsal.findings import Findings
from trl_diffusion.rehearsal.smoke import Measured, Result, Trial, try_out
from trl_diffusion.rehearsal.weights import PERIOD, random_policy_model


SPEC = SPECS["block-from-sequence"]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """All cores are for other tests, too. DeepSpeed takes seconds to be imported."""
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    monkeypatch.setattr(smoke, "planned_bytes", lambda trial, config, work: 2**30 * config.num_hidden_layers)


def test_kernels_that_work_and_one_that_is_wanted():
    findings = Findings()
    machine.check_kernels(findings, "cpu")
    assert findings.lines[0][1].startswith("sdpa: forward and backward under a packed mask on cpu, off by ")
    assert not findings.mistakes  # FlexAttention may have no backward pass on a CPU, and nothing asks for it
    works = any(text.startswith("flex_attention: ") for _, text in findings.lines)
    machine.check_kernels(findings, "cpu", "flex_attention")
    assert works or "flex_attention does not work on cpu" in findings.mistakes[0][1]


def test_a_wrong_kernel_is_seen(monkeypatch):
    """One that attends to everything."""
    monkeypatch.setattr(machine.PackedMask, "dense", lambda mask: torch.ones(1, 1, 24, 24, dtype=torch.bool))
    right = machine._difference(machine._sdpa, "cpu")
    monkeypatch.undo()
    wrong = machine._difference(
        lambda mask, *states: nn.functional.scaled_dot_product_attention(*states).transpose(1, 2), "cpu"
    )
    assert right < 1e-4 < 0.1 < wrong


def test_versions_out_of_range(monkeypatch):
    monkeypatch.setattr(
        machine, "requires", lambda name: ["torch>=99", "no-such-package>=1", "peft>=0.1", 'x>1; extra == "y"']
    )
    findings = Findings()
    machine.check_packages(findings)
    messages = [message for _, message in findings.mistakes]
    assert len(messages) == 2 and "but must be >=99" in messages[0] and "no-such-package is missing" in messages[1]


def test_seconds_lie_on_a_line():
    """3 seconds of one layer and 5 of three: one for each, and 2 beside them."""
    result = Result(Measured(1, 3.0, 10.0, 4, 8), Measured(3, 5.0, 10.0, 4, 8), Workload(), 1, None)
    assert result.whole(28, "rollout") == pytest.approx(30.0) and result.whole(28, "update") == pytest.approx(10.0)


def test_random_weights_of_large_matrices_are_random():
    """Of the standard deviation that the config asks for, and no two rows of them the same."""
    config = make_policy(
        SPEC, num_hidden_layers=1, vocab_size=40_000, initializer_range=0.02, tie_word_embeddings=False
    ).config
    before = torch.get_rng_state()
    weight = random_policy_model(config, torch.float32, "cpu").get_output_embeddings().weight.detach()
    assert weight.numel() > PERIOD and torch.equal(torch.get_rng_state(), before)
    assert weight.std().item() == pytest.approx(0.02, rel=0.01) and len(weight.unique(dim=0)) == len(weight)


def test_a_trial_runs_what_fits():
    """As many steps and tokens as the settings say; one layer, and two."""
    config = make_policy(SPEC, num_hidden_layers=3).config
    work = Workload(2, 2, 24, 16, tokens_per_step=2, rollout_batch_size=4, checkpointing=False)
    trial = Trial(config, SPEC, work, DecodingConfig(16, tokens_per_step=2))
    result = try_out(trial, 2, 1000.0)
    assert (result.few.layers, result.more.layers, result.planned) == (1, 2, 2**31)
    assert (result.work.rollout_batch_size, result.work.batch_size, result.work.prompt_length) == (4, 2, 24)
    assert (result.more.steps, result.more.tokens) == (8, 64)
    least = try_out(trial, 2, 0.0).work
    assert (least.rollout_batch_size, least.batch_size, least.prompt_length, least.completion_length) == (1, 1, 12, 8)


@pytest.mark.parametrize(("warm", "rollouts"), [(0.0, 2), (1000.0, 4)])
def test_a_slow_trial_is_not_repeated(monkeypatch, warm, rollouts):
    """What took long was no matter of a first call: it counts, if there is no time for more."""
    made = []
    monkeypatch.setattr(smoke, "decode", lambda *args, **options: made.append(1) or decode(*args, **options))
    monkeypatch.setattr(smoke, "WARM", warm)
    trial = Trial(make_policy(SPEC).config, SPEC, Workload(1, 1, 4, 8, checkpointing=False), DecodingConfig(8))
    result = try_out(trial, 2, 0.0)
    assert len(made) == rollouts and (result.few.layers, result.more.layers) == (1, 2)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor", "--seconds", "0"]) == 0
    out = capsys.readouterr().out
    for text in (
        "2 of 4 layers; a rollout of 1 and an update of 1 rows of 16 + 8 tokens, reduced from 512 and 512 rows of 256 + 17",
        "planned 2.00 GiB for the same shapes", "extrapolated on a line through 1 and 2 layers, to 4",
    ):  # fmt: skip
        assert text in out
    assert not list(Path().iterdir())


def test_a_time_that_is_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "check_kernels", lambda *_: None)
    assert doctor.main(["--seconds", "-1"]) == 2
    shown = capsys.readouterr()
    assert "error: options: `--seconds` must be a number of at least 0 and finite, got -1.0." in shown.err
    assert "rollout" not in shown.out


def test_mistakes_of_a_recipe(tmp_path, monkeypatch, capsys):
    """Options that a diffusion policy cannot have, and layers that do not fit."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("bf16: false\ntop_p: 0.5\nnum_generations: 1\noutput_dir: out\n")
    monkeypatch.setattr(doctor, "free_memory", lambda: 1000)
    assert doctor.main(["--config", "run.yaml"]) == 2
    error = capsys.readouterr().err
    assert (
        "`top_p`: tokens would be scored under" in error
        and "`num_generations` must be a whole number of at least 2" in error
    )
    assert "error: trial: 2 layers with" in error and "Lower `--layers`" in error
    shutil.rmtree("out", ignore_errors=True)
