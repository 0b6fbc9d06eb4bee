"""Small policies and trajectories that the tests share."""

from __future__ import annotations

import gc
import importlib.metadata
import os
from collections import defaultdict
from collections.abc import Callable
from fcntl import LOCK_EX, flock
from functools import cache


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from trl_diffusion.policies.spec import DiffusionSpec, set_spec  # noqa: E402


if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session", autouse=True)
def no_more_threads():
    """A command that takes all cores would take them for all later tests of this process, too, from those of another worker."""
    most, set_threads = torch.get_num_threads(), torch.set_num_threads
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_num_threads", lambda number: set_threads(min(number, most)))
        yield


def pytest_configure(config):
    """A GPU is seen by the tests that ask for one (`-m gpu`). All others are about what is the same on every machine."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    gc.disable()  # while everything is imported, which makes much and no garbage


def pytest_collection_finish():
    """
    What all tests import stays out of later collections of garbage. Every training collects it, and would take half a second to look at
    a million objects of imported packages. For the same reason the metadata of a package, which accelerate reads many times for every
    trainer, is read once.
    """
    gc.enable()
    gc.collect()
    gc.freeze()
    importlib.metadata.metadata = cache(importlib.metadata.metadata)


# Tests that take so long that `make test` leaves them to `make test-long`.
LONG = (
    "distributed/test_evaluation.py::test_rows_that_fill_up_do_not_count",
    "distributed/test_slurm.py::test_a_requeued_training_is_the_uninterrupted_one",
    "offline/test_kills.py::test_killed_trainings",
    "offline/test_kills.py::test_two_processes",
    "plan/test_plan.py::test_command",
    "plan/test_plan.py::test_what_train_refuses_is_refused",
    "policies/test_registration.py::test_families_are_registered_whatever_is_imported_first",
    "rehearsal/test_gpu_table.py",
    "serving/test_from_server.py::test_a_server_that_is_killed_in_the_middle",
    "trainer/test_families.py::test_stored_answers_of_every_family",
    "trainer/test_resume.py::test_resume_repeats_the_uninterrupted_run[online-between passes",
    "trainer/test_resume.py::test_resume_repeats_the_uninterrupted_run[online-end of an epoch",
    "trainer/test_resume.py::test_resume_repeats_the_uninterrupted_run[online-without groups",
    "trainer/test_resume.py::test_the_log_goes_on_where_it_was[5",
    "trainer/test_rowwise_evaluation.py::test_figures_are_those_of_trl_for_a_single_batch[luspo",
    "trainer/test_rowwise_evaluation.py::test_figures_are_those_of_trl_for_a_single_batch[cispo",
    "trainer/test_rowwise_evaluation.py::test_figures_are_those_of_trl_for_a_single_batch[bnpo",
    "test_docs.py::test_python_runs_as_printed[docs/evaluation",
    "test_docs.py::test_python_runs_as_printed[docs/howto/",
    "test_docs.py::test_python_runs_as_printed[docs/quickstart",
    "test_engine.py::test_processes_keep_pace",
    "test_evaluate.py::test_three_ways_agree",
    "test_gold.py::test_code_gold",
    "test_notebooks.py::test_notebooks_give_what_is_stored",
    "test_plan.py::test_what_grows_with_what",
    "test_preferences.py::test_gsm8k_pairs_in_every_format",
    "test_recipes.py::test_an_interrupted_run_of_two_processes",
    "test_sft.py::test_the_embedded_policy",
    "test_train.py::test_an_interrupted_run_goes_on",
    "test_train.py::test_gsm8k_preferences_with_the_real_tokenizer",
    "test_train.py::test_gsm8k_with_the_real_tokenizer",
    "test_train.py::test_lora_and_a_file_of_puzzles",
)
# Files of which it runs the first case of each test only.
LONG_CASES = (
    "decoding/test_revising.py", "decoding/test_short_responses.py", "offline/test_revised_rows.py", "scoring/test_revision.py",
    "scoring/test_revision_gradients.py", "trainer/test_revision.py", "viz/test_page.py", "viz/test_streamer.py",
    "viz/test_runs.py", "viz/test_colours.py", "recipes/test_lines.py", "test_names.py", "policies/test_places.py",
    "policies/test_left_to_right.py", "policies/test_registration.py", "recipes/test_evaluate.py", "policies/test_backbones.py",
    "rewards/test_weaker_sandbox.py", "trainer/test_evaluation.py", "trainer/test_resume_changes.py",
    "trainer/test_resume_grpo.py", "trainer/test_nothing_to_train_on.py", "trainer/test_dropout.py", "trainer/test_adapters.py", "policies/test_absent_tokens.py",
    "policies/test_written_checkpoints.py", "evaluation/test_likelihood.py", "decoding/test_engine.py",
)  # fmt: skip


def spread(cases: list[pytest.Item]) -> list[pytest.Item]:
    """Cases that have every value of every parameter. Of those with a value that is missing, the one with most that are."""
    values = {case: {(name, id(value)) for name, value in case.callspec.params.items()} for case in cases}
    chosen: list[pytest.Item] = []
    missing = set().union(*values.values())
    while missing:
        best = max(cases, key=lambda case: len(values[case] & missing))
        chosen.append(best)
        missing -= values[best]
    return chosen


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """
    Of a test with many cases, the first is fast; the others are slow, as they add up. If they are the combinations of several
    parameters, `make test` runs so many that every value comes up.
    """
    cases = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
        if any(part in item.nodeid for part in LONG):
            item.add_marker(pytest.mark.long)
    for group in cases.values():
        if len(group) > 1:
            chosen = spread(group)
            for item in group:
                if item not in chosen:
                    item.add_marker(pytest.mark.long)
        for item in group[1:]:
            item.add_marker(pytest.mark.slow)
            if item.nodeid.partition("::")[0].endswith(LONG_CASES):
                item.add_marker(pytest.mark.long)


MASK, STOP = 39, 5
SHARED = Path(__file__).resolve().parents[2] / "shared"

SPECS = {
    "block-from-sequence": DiffusionSpec(mask_token_id=MASK, block_size=8, stop_token_ids=(STOP,)),
    "block-from-response": DiffusionSpec(
        mask_token_id=MASK, block_size=8, block_origin="response", stop_token_ids=(STOP,)
    ),
    "shift-autoregressive-first": DiffusionSpec(
        mask_token_id=MASK, block_size=8, token_shift=True, first_token="autoregressive", stop_token_ids=(STOP,)
    ),
    "mask-predicted": DiffusionSpec(
        mask_token_id=MASK, block_size=4, stop_token_ids=(STOP,), predicts_mask_token=True
    ),
    "full": DiffusionSpec(
        mask_token_id=MASK, attention="full", block_size=8, block_origin="response", stop_token_ids=(STOP,)
    ),
    "full-shift": DiffusionSpec(
        mask_token_id=MASK,
        attention="full",
        block_size=12,
        block_origin="response",
        token_shift=True,
        stop_token_ids=(STOP,),
        predicts_mask_token=True,
    ),  # fmt: skip
    "clean-causal": DiffusionSpec(mask_token_id=MASK, block_size=8, stop_token_ids=(STOP,), clean_attention="causal"),
    "clean-causal-autoregressive-first": DiffusionSpec(
        mask_token_id=MASK,
        block_size=8,
        block_origin="response",
        first_token="autoregressive",
        stop_token_ids=(STOP,),
        clean_attention="causal",
    ),
    "block-of-one": DiffusionSpec(
        mask_token_id=MASK, block_size=1, token_shift=True, first_token="autoregressive", stop_token_ids=(STOP,)
    ),
}


def make_policy(spec: DiffusionSpec, seed: int = 0, backbone: str = "qwen3", **changes):
    """A random policy whose distributions are far from uniform, so that a wrong state shows."""
    config = AutoConfig.for_model(
        backbone,
        **{
            "vocab_size": 40,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 128,
            "initializer_range": 0.3,
            **changes,
        },
    )
    set_spec(config, spec)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def disturb(model: torch.nn.Module, scale: float = 0.02) -> None:
    """Adds noise to every weight, the same on every device."""
    for index, parameter in enumerate(model.parameters()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
        parameter.add_(scale * noise.to(parameter.device))


def make_prompts(lengths=(3, 8, 13, 21, 24, 1), seed: int = 0) -> list[list[int]]:
    """Prompts of unequal lengths: shorter than a block, ending inside one, ending with one."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(6, MASK, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(params=sorted(SPECS))
def spec(request) -> DiffusionSpec:
    return SPECS[request.param]


@pytest.fixture
def policy(spec):
    return make_policy(spec)


def shared(*parts: str) -> Path:
    """A file of the project's shared data; the test is skipped where it is not there."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{'/'.join(parts)} is not available")
    return path


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """A directory that is filled when it is first asked for, by whichever worker of xdist."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def directory_of(name: str, fill: Callable[[Path], object]) -> Path:
        directory = base / name
        directory.mkdir(exist_ok=True)
        done = directory / "done"
        with (directory / "lock").open("w") as lock:
            flock(lock, LOCK_EX)
            if not done.exists():
                done.write_text("failed")  # until it has not
                fill(directory)
                done.write_text("yes")
        assert done.read_text() != "failed", f"{name} has failed"
        return directory

    return directory_of
