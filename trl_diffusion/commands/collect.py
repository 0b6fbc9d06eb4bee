"""
Collects trajectories to train on later: a policy answers prompts, the answers are scored, and everything that training
needs is written to disk.

    trl-diffusion collect                                    # embedded policy, 4x4 sudoku
    trl-diffusion collect --task gsm8k --train_file data/gsm8k/train.jsonl --model_name_or_path MODEL
    trl-diffusion collect --server http://127.0.0.1:8000/v1  # answers of a server, such as `trl-diffusion serve`
    trl-diffusion collect --responses FILE.jsonl             # answers that are there already
    trl-diffusion train --trajectories outputs/trajectories  # then train, as often as you like

`accelerate launch recipes/collect.py` takes the same options.

An interrupted run goes on where it stopped when the same command is given again. Processes share the work.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from trl import ModelConfig, get_quantization_config

from ..decoding.config import DecodingConfig, RolloutSettings
from ..fields import AtLeast, Suggestions, Within, check_fields, with_default
from ..offline.collect import collect
from ..offline.endpoint import Endpoint
from ..offline.from_server import collect_from_server
from ..offline.responses import import_responses
from ..policies.files import COLLECTION
from ..policies.policy import open_facts, open_policy
from ..policies.prompts import read_chat_template_kwargs
from ..policies.tiny import PREFIX, tiny_policy_path
from ..quiet import hush_commands
from ..tasks import OTHERS, TASKS, check_task_name
from ..tasks.data import load_rewards
from ..tasks.rows import read_rows
from ..utils import check_writable, errors_in_a_line, processes, read_mapping, use_all_cores
from .data import DATA, DEFAULT, OwnData
from .dry import DryRun, is_dry
from .groups import COLLECT, INHERITED
from .interrupt import ending_in_a_line, how_to_go_on, is_part
from .options import OptionParser
from .parser import PROG, read_api_key


if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class CollectArguments(OwnData, RolloutSettings, DryRun):
    """What to collect."""

    output_dir: str = field(default="outputs/trajectories", metadata={"help": "Where the trajectories go."})
    task: str | None = field(
        default=None,
        metadata={
            "help": f"What to answer: {', '.join(sorted(TASKS))}, {OTHERS}. Without rows and rewards of your own, {DEFAULT}.",
            "choices": Suggestions(sorted(TASKS)),
            "metavar": "TASK",
        },
    )
    train_file: str | None = field(default=None, metadata={"help": "Rows to answer, as for `train`."})
    eval_file: str | None = field(default=None, metadata={"help": "Rows to leave out."})
    train_size: int = field(default=320, metadata={"help": "Most rows to answer."})
    eval_size: int = field(
        default=500,
        metadata={"help": "Most rows that `train` measures on, with the same number there. They are not answered."},
    )
    num_responses: Annotated[int, AtLeast(1)] = field(default=16, metadata={"help": "Responses to each prompt."})
    batch_size: Annotated[int, AtLeast(1)] = field(
        default=512, metadata={"help": "Responses that a process decodes at once."}
    )
    rows_per_shard: Annotated[int, AtLeast(1)] = field(default=64, metadata={"help": "Prompts in a shard."})
    seed: int = field(default=0, metadata={"help": "Source of randomness."})
    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "A LoRA adapter, which is used as it is, not merged."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer, if it is not in the model's directory."}
    )
    diffusion_spec: str | None = field(
        default=None, metadata={"help": "Fields of DiffusionSpec, as JSON, that complete those of the model."}
    )
    chat_template_kwargs: str | None = field(
        default=None,
        metadata={
            "help": "Variables of the chat template, as enable_thinking:false, as JSON, or a JSON or YAML file."
        },
    )
    max_completion_length: Annotated[int, AtLeast(1)] = field(
        default=17, metadata={"help": "Most tokens of a response. (TRL's name for max_new_tokens, as in `train`.)"}
    )
    temperature: Annotated[float, Within("[0, inf)")] = field(
        default=1.0, metadata={"help": "Temperature of sampling."}
    )
    tokens_per_step: int = with_default(RolloutSettings, "tokens_per_step", 2)
    server: str | None = field(
        default=None,
        metadata={
            "help": "Address of an OpenAI-compatible server that answers, such as http://127.0.0.1:8000/v1. Of the policy, only config "
            "and tokenizer are needed here."
        },
    )
    served_model: str | None = field(
        default=None, metadata={"help": "What the server calls the policy, if it has several."}
    )
    api_key_env: str | None = field(
        default=None, metadata={"help": "Variable of the environment with the server's API key.", "metavar": "NAME"}
    )
    concurrency: Annotated[int, AtLeast(1)] = field(
        default=32, metadata={"help": "Requests that a process sends to the server at the same time."}
    )
    responses: str | None = field(
        default=None,
        metadata={
            "help": "Responses that are there already: a .jsonl, .json or .csv file with `prompt` and `responses` or `response`, and "
            "perhaps rewards.",
            "metavar": "PATH",
        },
    )

    def __post_init__(self):
        check_fields(self)
        self._check_source()
        if self.responses is None:
            self.take_task()
        if self.task is not None:
            check_task_name(self.task)
        self.check_rollout_settings()
        self.decoding().check_responses(self.num_responses)  # which checks the decoding settings as well

    def _check_source(self) -> None:
        """Raises a `ValueError` if it is not clear where the responses come from, or an option has no use."""
        elsewhere = "server" if self.server is not None else "responses"
        if self.dry_run and getattr(self, elsewhere) is not None:
            raise ValueError(
                f"`--dry_run` rehearses what a policy answers here, and `--{elsewhere}` has the responses from elsewhere. Leave one of "
                "them out. Prompts and rows are checked before anything is written."
            )
        if self.server is None:
            for name in ("served_model", "api_key_env", "concurrency"):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ValueError(f"`--{name}` is for the answers of a server: give `--server`, too.")
        elif self.responses is not None:
            raise ValueError("`--server` and `--responses` are both where responses come from. Give one of them.")
        else:
            self._refuse(
                [one.name for one in fields(RolloutSettings)], "the server decodes. Give it to `trl-diffusion serve`"
            )
            self._refuse(["adapter_name_or_path"], "the server has the weights. Give it to `trl-diffusion serve`")
            self._refuse(
                ["batch_size"], "the server decodes. Set `--concurrency`, the number of requests at the same time"
            )
        if self.responses is not None:
            rows = [name for name in DATA if name != "reward_funcs"]
            self._refuse(rows, f"the prompts are in {self.responses}. Leave it out")
            settings = [one.name for one in fields(RolloutSettings)]
            self._refuse([*settings, *_OF_ANSWERS], f"the responses are in {self.responses} already. Leave it out")

    def _refuse(self, names: list[str], why: str) -> None:
        for name in names:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"`--{name}`: {why}.")

    def decoding(self) -> DecodingConfig:
        """Settings of the denoising loop."""
        settings = self.rollout_settings()
        if self.steps_per_block is not None:  # which is given then, and `tokens_per_step` is not
            del settings["tokens_per_step"]
        return DecodingConfig(self.max_completion_length, self.temperature, **settings)


# Options of answering that mean nothing for responses that are there already.
_OF_ANSWERS = ("num_responses", "temperature", "batch_size", "seed", "adapter_name_or_path")
# Options of `trl.ModelConfig` that are for weights.
_OF_WEIGHTS = ("dtype", "attn_implementation", "load_in_8bit", "load_in_4bit")
# Options of `trl.ModelConfig` that are for opening a model; the others are for training it.
OPENING = (
    "model_name_or_path",
    "model_revision",
    "attn_implementation",
    "dtype",
    "load_in_8bit",
    "load_in_4bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
    "bnb_4bit_quant_storage",
)


def check_model_options(model_args: ModelConfig) -> None:
    """Raises a `ValueError` if an option is set that nothing would look at."""
    for option in fields(model_args):
        if getattr(model_args, option.name) == option.default:
            continue
        if option.name not in OPENING:
            hint = " (an adapter that is there is opened with `--adapter_name_or_path`)"
            raise ValueError(
                f"`--{option.name}` is for training: the policy answers as it is{hint if 'peft' in option.name else ''}. "
                "Leave it out."
            )
        if "bnb" in option.name and not model_args.load_in_4bit:
            raise ValueError(f"`--{option.name}` is for weights of 4 bits: add `--load_in_4bit`, or leave it out.")
    if model_args.load_in_4bit and model_args.dtype == "auto":
        raise ValueError("`--load_in_4bit` computes in `--dtype`: give bfloat16, float16 or float32, not auto.")


def check_no_weights(model_args: ModelConfig) -> None:
    """Raises a `ValueError` if an option is set that is for weights, where only config and tokenizer are read."""
    for option in fields(model_args):
        if option.name in _OF_WEIGHTS and getattr(model_args, option.name) != option.default:
            raise ValueError(
                f"`--{option.name}` is for weights, and with `--server` or `--responses` none are loaded here. Leave it out."
            )


def stored_decoding(args: CollectArguments) -> DecodingConfig:
    """Settings of the denoising loop. Raises a `ValueError` for some whose responses cannot be trained on."""
    decoding = args.decoding()
    if decoding.approximate_cache is not None:
        raise ValueError(
            "`--approximate_cache` is for rollouts: stored responses made with it cannot be trained on, as their recorded "
            "log-probabilities are not the policy's. Leave it out."
        )
    return decoding


def policy_path(args: CollectArguments, model_args: ModelConfig) -> str | None:
    """The path or hub id of the policy, the embedded one by default. `None`: the model that the adapter was made for."""
    return model_args.model_name_or_path or (None if args.adapter_name_or_path else tiny_policy_path())


def run(args: CollectArguments, model_args: ModelConfig) -> None:
    """Collects."""
    use_all_cores()
    args.check_wet()
    check_model_options(model_args)
    check_writable(args.output_dir, "--output_dir")  # before weights are loaded
    decoding, template = stored_decoding(args), read_chat_template_kwargs(args.chat_template_kwargs)
    if args.responses is not None or args.server is not None:
        directory = _without_weights(args, model_args, template)
    else:
        directory = _with_policy(args, model_args, decoding, template)
    processes().print(f"Trajectories and their card are in {directory}.")
    if not is_part():
        processes().print("Next:", *next_commands(args, model_args), sep="\n  ")


def _with_policy(
    args: CollectArguments, model_args: ModelConfig, decoding: DecodingConfig, template: dict[str, Any]
) -> Path:
    """Collects what a policy answers here."""
    task = args.load_task(args.train_size, args.eval_size, args.seed)
    policy = open_policy(
        policy_path(args, model_args),
        args.adapter_name_or_path,
        args.tokenizer_name_or_path,
        revision=model_args.model_revision,
        dtype=model_args.dtype or "float32",
        device=processes().device,
        attn_implementation=model_args.attn_implementation,
        quantization=get_quantization_config(model_args),
        diffusion_spec=read_mapping(args.diffusion_spec, "diffusion_spec"),
    )
    return collect(
        cast("PreTrainedModel", policy.model),
        policy.tokenizer,
        task.train,
        task.reward_funcs,
        args.output_dir,
        decoding,
        num_responses=args.num_responses,
        spec=policy.spec,
        batch_size=args.batch_size,
        rows_per_shard=args.rows_per_shard,
        seed=args.seed,
        chat_template_kwargs=template,
    )


def _without_weights(args: CollectArguments, model_args: ModelConfig, template: dict[str, Any]) -> Path:
    """Collects what a server answers, or imports responses."""
    check_no_weights(model_args)
    path = model_args.model_name_or_path or tiny_policy_path()
    spec_fields = read_mapping(args.diffusion_spec, "diffusion_spec")
    config, tokenizer, spec = open_facts(path, args.tokenizer_name_or_path, model_args.model_revision, spec_fields)
    if args.responses is not None:
        return import_responses(
            read_rows(args.responses),
            tokenizer,
            spec,
            config,
            args.output_dir,
            load_rewards(args.reward_funcs) if args.reward_funcs else None,
            args.max_completion_length,
            args.rows_per_shard,
            args.responses,
            chat_template_kwargs=template,
        )
    assert args.server is not None
    task = args.load_task(args.train_size, args.eval_size, args.seed)
    return collect_from_server(
        Endpoint(args.server, read_api_key(args.api_key_env)),
        tokenizer,
        spec,
        config,
        task.train,
        task.reward_funcs,
        args.output_dir,
        args.max_completion_length,
        args.temperature,
        args.served_model,
        num_responses=args.num_responses,
        rows_per_shard=args.rows_per_shard,
        concurrency=args.concurrency,
        seed=args.seed,
        chat_template_kwargs=template,
    )


# Options of `collect` that `train` does not have, or has with another meaning.
_OWN = (
    "output_dir", "train_size", "num_responses", "batch_size", "rows_per_shard", "seed", "adapter_name_or_path", "server",
    "served_model", "api_key_env", "concurrency", "responses",
)  # fmt: skip


def next_commands(args: CollectArguments, model_args: ModelConfig) -> list[str]:
    """The commands that show a stored response and train on all of them."""
    commands = [[PROG, "view", args.output_dir, "0", "--output", "response.html"]]
    train = [PROG, "train", "--trajectories", args.output_dir]
    if model_args.model_name_or_path is None and args.task == "sudoku":
        commands.append([*train, "--config", "tiny_offline"])
    elif (
        args.adapter_name_or_path is None and args.responses is None
    ):  # `train` begins with a whole model, and measures on rows
        given = {one.name: (getattr(args, one.name), one.default) for one in fields(args) if one.name not in _OWN}
        settings = {
            "model_name_or_path": model_args.model_name_or_path or f"{PREFIX}block",
            **{name: value for name, (value, default) in given.items() if value != default},
            **{name: getattr(args, name) for name in ("max_completion_length", "tokens_per_step")},
            **({"task": args.task} if args.task else {}),
            "loss_type": "dpo",
            "beta": 0.1,
        }
        for name, value in settings.items():
            train += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        commands.append(train)
    return [shlex.join(words) for words in commands]


def kept(output_dir: str) -> str:
    """What an interrupted collection has, and how to go on."""
    directory = Path(output_dir)
    try:
        total = json.loads((directory / COLLECTION).read_text())["num_shards"]
    except (OSError, ValueError, KeyError):
        return "Nothing was collected yet."
    done = len(list((directory / "data").glob("shard-*.parquet")))
    return f"{done} of {total} shards are kept in {directory}. {how_to_go_on()}"


KINDS = (CollectArguments, ModelConfig)  # which have the options


def parse(arguments: list[str] | None = None) -> tuple[CollectArguments, ModelConfig]:
    """Reads options, those of the command line by default."""
    return cast("tuple[CollectArguments, ModelConfig]", _parser().read(arguments))


def _parser() -> OptionParser:
    hidden = [one.name for one in fields(ModelConfig) if one.name not in OPENING]
    return OptionParser("collect", KINDS, __doc__, COLLECT, INHERITED, hidden)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command, with the options of the command line by default."""
    if is_dry(arguments):
        from . import dry_run  # here, since it knows this command

        raise SystemExit(dry_run.main("collect", arguments))
    hush_commands()
    directory = ""
    with ending_in_a_line(lambda: kept(directory)), errors_in_a_line():
        args, model_args = parse(arguments)
        directory = args.output_dir
        run(args, model_args)


if __name__ == "__main__":
    main()
