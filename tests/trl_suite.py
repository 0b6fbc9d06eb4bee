"""
Runs TRL's own tests of `GRPOTrainer` on `DTRPOTrainer`:

    python tests/trl_suite.py PATH_OF_A_TRL_CHECKOUT [arguments of pytest]

The tests are `tests/test_grpo_trainer.py` of the checkout; the TRL that is tested with is the installed one, and no file of it is
copied. Models and data are made here, tiny, random and local, in a temporary directory in which they have the names that the tests
ask the hub for. Nothing is fetched.

A test may fail for a reason that the table in docs/howto/grpo.md gives; `NOT_SUPPORTED` says which test fails for which reason. One
that fails otherwise is run again on TRL's own trainer: what fails there with the same error is a matter of two versions of TRL.
The exit code is 1 if any other test fails, if one passes that is said to be not supported, or if a reason is not in the table.
"""

from __future__ import annotations

import os
import sys


if __name__ == "__main__":  # before the imports that look at them
    os.environ.update(
        HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TRANSFORMERS_VERBOSITY="error"
    )
    os.environ.setdefault("OMP_NUM_THREADS", "2")

import codecs  # noqa: E402
import contextlib  # noqa: E402
import gc  # noqa: E402
import importlib  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
import tempfile  # noqa: E402
from collections import defaultdict  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from importlib.util import find_spec  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from datasets import Dataset, disable_progress_bars  # noqa: E402
from packaging.version import Version  # noqa: E402
from PIL import Image  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from trl_diffusion import DiffusionSpec, DTRPOConfig, DTRPOTrainer, set_spec  # noqa: E402


PAGE = Path(__file__).resolve().parents[1] / "docs" / "howto" / "grpo.md"


@dataclass(frozen=True)
class Row:
    """Tests that fail because of something that is not supported."""

    tests: str  # regular expression of their whole names
    what: str  # an entry of the first column of the table
    error: str  # regular expression of what their errors hold


# What is not supported, and which tests show it.
NOT_SUPPORTED = (
    Row(r"TestGRPOTrainer::test_trust_remote_code", "trust_remote_code", "has the model type 'remote'"),
    Row(
        r".*::(.*liger.*|test_train_(loss_types|with_bias_correction_kl|delta_clipping)\[(.*-)?True.*\])",
        "use_liger_kernel",
        "`use_liger_kernel`: its fused loss",
    ),
    Row(
        r"TestGRPOTrainer::test_train\[.*NemotronH.*\]",
        "backbones with recurrent or convolutional layers",
        "an attention mask does not rule",
    ),
    Row(r".*::test_train_with_generation_kwargs", "generation_kwargs", "`generation_kwargs`: they generate from"),
    Row(r".*::test_train_with_additional_generation_kwargs", "top_p", "`top_p`: tokens would be scored under"),
    # Its responses come from a mock of `generate`.
    Row(
        r"TestGRPOTrainer::test_train_with_mask_truncated_completions",
        "the model's own generate",
        "has not changed",
    ),
    Row(
        r"TestGRPOTrainer::test_entropy_bonus_flows_gradients",
        "log-probabilities of token ids alone",
        "depends on the order",
    ),
    Row(r".*::test_train_with_(.*_)?tool(s|_calls).*", "tools", "`tools` is not supported"),
    Row(
        r".*::test_(?!dataset_required_without).*environment.*",
        "environment_factory",
        "`environment_factory` is not supported",
    ),
    # It loads the model before it makes the trainer, and a model that sees is not made here.
    Row(r"TestGRPOTrainerVLM::test_train_vlm_peft.*", "images", "couldn't find them"),
    Row(r"TestGRPOTrainerVLM::.*", "images", r"has \['images?'\]: diffusion policies here take text only"),
)

# ------------------------------------------------------------------------------------------------------ models and data

HUB = "trl-internal-testing"
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 1024,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
POLICIES = {
    "tiny-Gemma2ForCausalLM": ("gemma2", {"attn_logit_softcapping": None}),
    "tiny-Glm4MoeForCausalLM": ("glm4_moe", {"n_routed_experts": 4, "first_k_dense_replace": 1, **EXPERTS}),
    "tiny-GptOssForCausalLM": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "tiny-LlamaForCausalLM-3.2": ("llama", {}),
    "tiny-MistralForCausalLM-0.2": ("mistral", {}),
    "tiny-Qwen2ForCausalLM-2.5": ("qwen2", {}),
    "tiny-Qwen3ForCausalLM": ("qwen3", {}),
    "tiny-Qwen3MoeForCausalLM": ("qwen3_moe", {"num_experts": 4, **EXPERTS}),
}
TRANSFORMERS = Version(transformers.__version__)
if TRANSFORMERS >= Version("5.5"):  # before, its config is refused by newer versions of huggingface_hub
    POLICIES["tiny-Cohere2ForCausalLM"] = ("cohere2", {})
if TRANSFORMERS >= Version("5.7"):  # before, TRL's tests skip it
    POLICIES["tiny-NemotronHForCausalLM-nano"] = (
        "nemotron_h",
        {"layers_block_type": ["mamba", "attention"], "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 4}
        | {"n_groups": 1, "chunk_size": 8},
    )
REWARD_MODELS = {
    "tiny-LlamaForSequenceClassification-3.2": "llama",
    "tiny-Qwen2ForSequenceClassification-2.5": "qwen2",
    "tiny-Qwen3ForSequenceClassification": "qwen3",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and a chat template."""
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        mask_token="<|mask|>",
        additional_special_tokens=["<|im_start|>", "<|finetune_right_pad_id|>"],
        chat_template=CHAT_TEMPLATE,
    )


def make_models(root: Path) -> None:
    """Random policies in blocks of 4, and reward models."""
    tokenizer = make_tokenizer()
    spec = DiffusionSpec(mask_token_id=tokenizer.mask_token_id, block_size=4, stop_token_ids=(tokenizer.eos_token_id,))
    sizes = {
        **SIZES,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    for name, (backbone, changes) in POLICIES.items():
        config = AutoConfig.for_model(backbone, **sizes, **changes)
        set_spec(config, spec)
        policy = AutoModelForCausalLM.from_config(config)
        # As in TRL's tiny models, a response hardly ever stops: logits have a standard deviation of 4, and this one is 0.
        with torch.no_grad():
            policy.get_output_embeddings().weight.normal_()[tokenizer.eos_token_id] = 0.0
        policy.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    for name, backbone in REWARD_MODELS.items():
        config = AutoConfig.for_model(backbone, **sizes, num_labels=1)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    remote = root / "tiny-RemoteForCausalLM"  # its code is never run
    tokenizer.save_pretrained(remote)
    (remote / "config.json").write_text(
        json.dumps({"model_type": "remote", "auto_map": {"AutoConfig": "configuration_remote.RemoteConfig"}})
    )
    (remote / "configuration_remote.py").write_text("raise RuntimeError\n")


def make_data(root: Path) -> None:
    """Prompts as text and as messages, and with pictures: beginnings of the lines of Python's own Zen."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    lines = codecs.decode(this.s, "rot13").splitlines()[2:]
    num_words = (4, 2, 3, 1, 4, 3, 1, 4, 3, 3, 2, 6, 5, 4)
    prompts = [" ".join(line.split()[:count]) for line, count in zip(lines, num_words, strict=False)]
    messages = [[{"role": "user", "content": f"How does it go on: {prompt}"}] for prompt in prompts]
    picture = Image.new("RGB", (8, 8))
    _write_dataset(
        root / "zen",
        standard_prompt_only=[{"prompt": prompt} for prompt in prompts],
        conversational_prompt_only=[{"prompt": prompt} for prompt in messages],
    )
    _write_dataset(
        root / "zen-image", conversational_prompt_only=[{"prompt": prompt, "image": picture} for prompt in messages]
    )
    _write_dataset(
        root / "zen-multi-image",
        conversational_prompt_only=[{"prompt": prompt, "images": [picture, picture]} for prompt in messages],
    )


def _write_dataset(path: Path, **configs: list[dict]) -> None:
    """A dataset as on the hub: the last two rows are the test split of each config."""
    card = ["---", "configs:"]
    for name, rows in configs.items():
        card += [f"- config_name: {name}", "  data_files:"]
        (path / name).mkdir(parents=True)
        for split, part in (("train", rows[:-2]), ("test", rows[-2:])):
            Dataset.from_list(part).to_parquet(path / name / f"{split}.parquet")
            card += [f"  - split: {split}", f"    path: {name}/{split}.parquet"]
    (path / "README.md").write_text("\n".join([*card, "---", ""]))


# --------------------------------------------------------------------------------------------------------- running them


@dataclass(frozen=True)
class Result:
    """What became of a test."""

    outcome: str  # "passed", "failed", "skipped"
    text: str  # its error, or why it was skipped


class Swap:
    """Plugin of pytest that puts a trainer and its config where the tests have `GRPOTrainer` and `GRPOConfig`."""

    def __init__(self, trainer: type, config: type):
        self.trainer, self.config = trainer, config
        self.results: dict[str, Result] = {}

    def pytest_collection_modifyitems(self, items):
        for module in {item.module for item in items}:
            module.GRPOTrainer, module.GRPOConfig = self.trainer, self.config

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        name = item.nodeid.split("::", 1)[1]
        if report.outcome != "passed" or (report.when == "call" and name not in self.results):
            text = (
                f"{type(call.excinfo.value).__name__}: {call.excinfo.value}" if call.excinfo else report.longreprtext
            )
            self.results[name] = Result(report.outcome, text)
        return report


def run(checkout: Path, swap: Swap, arguments: list[str]) -> int:
    """pytest on the checkout, with what pytest needs in the current directory."""
    Path("pytest.ini").write_text("[pytest]\nmarkers =\n    slow\n    low_priority\n")
    file = checkout / "tests" / "test_grpo_trainer.py"
    options = [
        "-c",
        "pytest.ini",
        "--rootdir",
        str(checkout),
        "-p",
        "no:cacheprovider",
        "-q",
        "--disable-warnings",
        *arguments,
    ]
    selected = [argument for argument in arguments if "::" in argument]
    return pytest.main([*options, *([] if selected else [str(file)])], plugins=[swap])


def tolerate_other_versions() -> None:
    """The helpers of a checkout may ask the installed TRL about packages that it does not know."""

    def missing(name: str):
        package = re.fullmatch(r"is_(\w+)_available", name)
        if package is None:
            raise AttributeError(name)
        return lambda: find_spec(package[1]) is not None

    importlib.import_module("trl.import_utils").__getattr__ = missing


# -------------------------------------------------------------------------------------------------------------- verdict


def reasons() -> dict[str, str]:
    """What docs/howto/grpo.md says is not supported, each with the reason."""
    table = PAGE.read_text().split("| not supported | why |")[1].split("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return {what.replace("`", ""): why for names, why in rows for what in re.split(r", | and all ", names)}


def judge(
    results: dict[str, Result], known: dict[str, str], rows: tuple[Row, ...] = NOT_SUPPORTED
) -> dict[str, list[str]]:
    """
    Sorts the tests.

    Args:
        results (`dict[str, Result]`): what became of each test.
        known (`dict[str, str]`): what is not supported, with the reason.
        rows (tuple of [`Row`], *optional*): which tests fail for which reason.

    Returns:
        `dict[str, list[str]]`: lines to show, under `"passed"`, `"not supported"`, `"needs what is not here"`, `"failed"` and
        `"wrong"`, which is what contradicts `rows`.
    """
    sorted_: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.what not in known:
            sorted_["wrong"].append(f"`{row.what}` ({row.tests}) is not in the table of {PAGE.name}")
    for name, result in results.items():
        row = next((row for row in rows if re.fullmatch(row.tests, name)), None)
        if result.outcome == "skipped":
            sorted_["needs what is not here"].append(f"{result.text.removeprefix('Skipped: ')}: {name}")
        elif row is None:
            sorted_[result.outcome].append(name)
        elif result.outcome == "passed":
            sorted_["wrong"].append(f"{name} passes, although `{row.what}` is said to be not supported")
        elif re.search(row.error, result.text):
            sorted_["not supported"].append(f"{row.what}: {name}")
        else:
            sorted_["failed"].append(name)
    return sorted_


def same_failure(ours: Result, theirs: Result) -> bool:
    """Whether a test fails on TRL's own trainer in the same way. What pytest adds to an assertion does not matter."""
    texts = [
        re.sub(r"\n \+.*|0x[0-9a-f]+|pytest-\d+", "", result.text).replace("DTRPO", "GRPO")
        for result in (ours, theirs)
    ]
    return theirs.outcome == "failed" and texts[0] == texts[1]


def show(title: str, lines: list[str], detail: bool = True) -> None:
    print(f"\n{len(lines)} {title}")
    for line in sorted(lines) if detail else ():
        print(f"  {line}")


def main() -> int:
    if len(sys.argv) < 2 or not (Path(sys.argv[1]) / "tests" / "test_grpo_trainer.py").exists():
        sys.exit(f"{Path(__file__).name}: give the path of a checkout of TRL; it has tests/test_grpo_trainer.py")
    checkout, arguments = Path(sys.argv[1]).resolve(), sys.argv[2:]
    tolerate_other_versions()
    logging.disable_progress_bar()
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            make_models(Path(HUB))
        make_data(Path(HUB))
        gc.freeze()  # TRL's tests collect garbage after each test
        ours = Swap(DTRPOTrainer, DTRPOConfig)
        run(checkout, ours, arguments)
        sorted_ = judge(ours.results, reasons())
        theirs = Swap(GRPOTrainer, GRPOConfig)
        if sorted_["failed"]:
            file = checkout / "tests" / "test_grpo_trainer.py"
            run(checkout, theirs, ["--tb=no", *(f"{file}::{name}" for name in sorted_["failed"])])
    fail_there = [name for name in sorted_["failed"] if same_failure(ours.results[name], theirs.results[name])]
    fail_here = [name for name in sorted_["failed"] if name not in fail_there]

    show("passed", sorted_["passed"], detail=False)
    show(f"not supported, with the reason in {PAGE.name}", sorted_["not supported"])
    show("need what is not here", sorted_["needs what is not here"])
    show(
        "fail on TRL's own trainer in the same way: the checkout is of another version",
        [f"{name}: {theirs.results[name].text.splitlines()[0]}" for name in fail_there],
    )
    show("unexpected", sorted_["wrong"] + [f"{name}: {ours.results[name].text}" for name in fail_here])
    return int(bool(sorted_["wrong"] or fail_here or not ours.results))


if __name__ == "__main__":
    sys.exit(main())
