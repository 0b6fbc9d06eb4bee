"""Every YAML file of recipes/ goes through the parser that it is written for, and says how it is used."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from trl import get_peft_config

from trl_diffusion.commands import sft, train
from trl_diffusion.utils import load_yaml


ROOT = Path(__file__).resolve().parents[2]
ROUNDS = ROOT / "recipes" / "tiny_iterate.yaml"  # of another command, see test_iterate.py
ADAPTING = ROOT / "recipes" / "smollm2_word_sums.yaml"  # of another command, see test_adapt.py
RECIPES = sorted(set((ROOT / "recipes").glob("*.yaml")) - {ROUNDS, ADAPTING})
ENGINES = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))


def launch_lines(path: Path) -> list[list[str]]:
    """The commands in a file's header, split into words."""
    header = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
    text = " ".join(header).replace("\\ ", "")
    return [shlex.split(line) for line in re.findall(r"accelerate launch .*?(?= accelerate launch |[.:] |$)", text)]


def parse(path: Path):
    command = sft if path.stem.endswith("_sft") else train
    return command.parse(["--config", str(path), "--use_cpu", str(not torch.cuda.is_available())])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_parse(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script, args, model = parse(path)
    assert args.output_dir == f"outputs/{path.stem}"
    if not model.model_name_or_path:
        return
    # Adapters name their layers, since PEFT's own defaults do not know the families.
    peft = get_peft_config(model)
    assert (peft is None) == (not model.use_peft)
    if peft is not None:
        assert set(peft.target_modules) == {
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        }
    small = path.stem.endswith(("_24gb", "_sft"))  # for a small GPU
    assert model.load_in_4bit == small
    assert peft is not None or not small


@pytest.mark.parametrize(
    ("family", "published"),
    [
        ("llada", ("elbo", False)),
        ("dream", ("elbo", False)),
        ("fast_dllm_v2", ("mean", True)),
        ("sdar", ("mean", True)),
    ],
)
def test_each_family_is_tuned_with_its_loss(family, published):
    """Also with the model and the layers of its recipes for reinforcement learning."""
    path = ROOT / "recipes" / f"{family}_sft.yaml"
    script, args, model = parse(path)
    assert (args.weighting, args.complementary) == published
    assert args.canvas_length == (script.max_completion_length if family in ("llada", "dream") else None)
    assert (
        path in RECIPES
        and model.model_name_or_path == parse(ROOT / "recipes" / f"{family}.yaml")[2].model_name_or_path
    )


@pytest.mark.parametrize("path", [*RECIPES, ADAPTING, *ENGINES], ids=lambda path: path.stem)
def test_headers_say_how_to_launch(path):
    lines = launch_lines(path)
    assert lines
    own = f"recipes/{path.stem}.yaml" if path not in ENGINES else f"recipes/accelerate/{path.stem}.yaml"
    for words in lines:
        for word in words:
            if word.endswith(".yaml") or word.startswith("recipes/"):
                assert (ROOT / word).exists(), word
    assert any(own in words for words in lines) or path.stem in ("tiny_sudoku", "tiny_sft")
    launcher = "recipes/sft.py" if path.stem.endswith("_sft") else "recipes/train.py"
    launcher = "recipes/adapt.py" if path == ADAPTING else launcher
    assert path in ENGINES or any(launcher in words for words in lines)


@pytest.mark.parametrize("path", ENGINES, ids=lambda path: path.stem)
def test_engines_load(path):
    config = load_config_from_file(str(path))
    engine = path.stem.removesuffix("_2x8")
    machines = 2 if path.stem.endswith("_2x8") else 1
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}
    assert config.distributed_type == kinds.get(engine, "DEEPSPEED")
    assert config.num_processes == 8 * machines and config.mixed_precision == "bf16"
    assert config.num_machines == machines
    stage = {"zero2": 2, "zero3": 3, "zero3_offload": 3}.get(engine)
    assert config.deepspeed_config.get("zero_stage") == stage
    offload = "cpu" if path.stem == "zero3_offload" else ("none" if stage else None)
    assert config.deepspeed_config.get("offload_param_device") == offload
    assert config.fsdp_config.get("fsdp_version") == (2 if engine == "fsdp2" else None)
    args = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    args, *_ = _validate_launch_command(args)
    assert args.num_processes == 8 * machines


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_two_machines_divide_as_one_does(engine):
    """The config of two machines is that of one in everything else."""
    one, two = (load_yaml(ROOT / "recipes" / "accelerate" / f"{engine}{machines}.yaml") for machines in ("", "_2x8"))
    added = {"main_process_port": 29500, "rdzv_backend": "static", "same_network": True}  # how they find each other
    assert two == {**one, **added, "num_machines": 2, "num_processes": 16}
