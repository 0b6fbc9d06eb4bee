"""Measuring a policy on benchmarks, with samples, costs and intervals, in files that are whole or not there."""

from __future__ import annotations

import json
import logging
import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import xxhash
from accelerate.utils import broadcast_object_list, gather_object

from ..decoding.config import DecodingConfig
from ..fields import AtLeast, check_fields, check_kind
from ..policies.files import policy_in
from ..policies.policy import Policy
from ..seeds import derive_seed
from ..tasks.data import fingerprint_rows
from ..tasks.task import MEAN_REWARD, interval_of
from ..trajectories.fingerprint import fingerprint_policy
from ..utils import check_writable, processes, read_record, wilson, write_text
from . import tasks_path
from .benchmarks import BENCHMARKS, Benchmark, TaskBenchmark
from .generate import Usage, cut, generate


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HarnessTask:
    """
    A benchmark whose questions are on the hub and that lm-evaluation-harness runs.

    Attributes:
        task (`str`): its name there, for a policy without a chat template.
        chat_task (`str`): its name there, for one with a chat template.
        metric (`str`): what is reported; 0 or 1 for each question.
        filter (`str`): the filter of answers that it is reported for.
        runs_code (`bool`): whether it runs what the policy wrote.
    """

    task: str
    chat_task: str
    metric: str = "solved"
    filter: str = "none"
    runs_code: bool = False


HARNESS_TASKS = {
    "gsm8k": HarnessTask("gsm8k_verified", "gsm8k_verified"),
    "math": HarnessTask("math_verified", "math_verified"),
    "math500": HarnessTask("math500_verified", "math500_verified"),
    "gpqa": HarnessTask("gpqa_diamond_cot_zeroshot", "gpqa_diamond_cot_zeroshot", "exact_match", "flexible-extract"),
    "humaneval": HarnessTask("humaneval_sandboxed", "humaneval_chat_sandboxed", runs_code=True),
    "humaneval_plus": HarnessTask("humaneval_plus_sandboxed", "humaneval_plus_chat_sandboxed", runs_code=True),
    "mbpp_plus": HarnessTask("mbpp_plus_sandboxed", "mbpp_plus_chat_sandboxed", runs_code=True),
    "ifeval": HarnessTask("ifeval", "ifeval", "prompt_level_strict_acc"),
}
_OF_A_MEASUREMENT = ("task", "seed", "settings", "questions", "skipped", "accuracy")  # beside what it cost
_AGAIN = "Delete it to have it measured again."
TASK_NAMES = tuple(sorted({*BENCHMARKS, *HARNESS_TASKS}))


@dataclass
class Measured:
    """
    What a policy did on a benchmark, with one seed.

    Attributes:
        samples (`list[dict]`): one for each question: what was asked, the answer, its score (1, 0, or `None` if there is
            no telling).
        usage ([`Usage`]): what the answers cost; of the slowest process, as far as time goes.
    """

    samples: list[dict[str, Any]]
    usage: Usage = field(default_factory=Usage)


# ---------------------------------------------------------------------------------------------------- measuring


def measure_local(
    policy: Policy,
    benchmark: Benchmark,
    rows: list[dict[str, Any]],
    decoding: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 32,
    checker: Callable | None = None,
    progress: bool = False,
) -> Measured:
    """
    Asks a policy the questions of a benchmark and checks the answers. Processes share the questions; all get the result.

    Args:
        policy ([`Policy`]): who answers.
        benchmark ([`Benchmark`]): what the rows are of.
        rows (`list[dict]`): its rows.
        decoding (`Mapping[str, Any]`, *optional*): settings of [`DecodingConfig`]. Greedy and the benchmark's number of
            tokens, where they do not say.
        seed (`int`, *optional*, defaults to `0`): source of randomness, if there is a temperature.
        batch_size (`int`, *optional*, defaults to `32`): answers at a time, on each process.
        checker (`Callable`, *optional*): the benchmark's checker, if there is one already.
        progress (`bool`, *optional*, defaults to `False`): whether the main process shows a progress bar.
    """
    state = processes()
    chat = benchmark.conversational and policy.tokenizer.chat_template is not None
    config = DecodingConfig(**{"max_new_tokens": benchmark.max_new_tokens, **(decoding or {})})
    own = list(range(state.process_index, len(rows), state.num_processes))
    questions = [benchmark.question(rows[number], chat) for number in own]
    completions, usage = generate(
        policy,
        policy.fit(policy.encode(questions), config.max_new_tokens),
        config,
        [derive_seed(seed, number, 0, 0) for number in own],
        batch_size,
        f"{benchmark.name}, seed {seed}" if progress and state.is_main_process else None,
    )
    answers = policy.decode(completions)
    if not chat:
        answers = [cut(answer, benchmark.stops) for answer in answers]
    scores = benchmark.score([rows[number] for number in own], answers, checker or benchmark.check()) if own else []
    samples: list[dict[str, Any]] = [
        {"question": number, "prompt": question, "answer": answer, "tokens": len(completion), "score": score}
        for number, question, answer, completion, score in zip(
            own, questions, answers, completions, scores, strict=True
        )
    ]
    if state.num_processes > 1:
        samples, usage = sorted(gather_object(samples), key=lambda sample: sample["question"]), _shared(usage)
    return Measured(samples, usage)


def measure_with_harness(
    policy: Policy,
    task: HarnessTask,
    decoding: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 32,
    limit: int | None = None,
    allow_code_execution: bool = False,
) -> Measured | None:
    """
    The same for a benchmark of the hub, run by lm-evaluation-harness.

    Args:
        task ([`HarnessTask`]): what to run.
        limit (`int`, *optional*): most questions.
        allow_code_execution (`bool`, *optional*, defaults to `False`): whether programs may be run, in the sandbox.
        policy, decoding, seed, batch_size: see [`measure_local`].

    Returns:
        [`Measured`] on the main process, `None` elsewhere.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from .harness import DiffusionLM

    chat = policy.tokenizer.chat_template is not None
    name = task.chat_task if chat else task.task
    shipped = (Path(tasks_path()) / f"{name}.yaml").is_file()
    lm = DiffusionLM(policy=policy, decoding=decoding, seed=seed, batch_size=batch_size)
    results = simple_evaluate(
        model=lm,
        tasks=[name],
        task_manager=TaskManager(include_path=tasks_path(), include_defaults=not shipped),  # the others are many
        limit=limit,
        apply_chat_template=chat,
        log_samples=True,
        bootstrap_iters=0,
        confirm_run_unsafe_code=allow_code_execution,
        # The seeds of global random states: those of tasks, not of the policy.
        random_seed=0,
        numpy_random_seed=1234,
        torch_random_seed=1234,
        fewshot_random_seed=1234,
    )
    usage = _shared(lm.usage)
    if results is None:
        return None
    samples = [
        {
            "question": sample["doc_id"],
            "prompt": sample["arguments"][0][0],
            "answer": sample["resps"][0][0],
            "score": float(sample[task.metric]),
        }
        for sample in results["samples"][name]
        if sample["filter"] == task.filter
    ]
    return Measured(sorted(samples, key=lambda sample: sample["question"]), usage)


def _shared(usage: Usage) -> Usage:
    """What all processes did together."""
    total = Usage()
    parts = gather_object([usage]) if processes().num_processes > 1 else [usage]
    for part in parts:
        total.add(part)
    total.seconds = max(part.seconds for part in parts)
    return total


# --------------------------------------------------------------------------------------------------- a whole run


@dataclass
class Evaluation:
    """
    A run over benchmarks and seeds that leaves its results in a directory.

    Args:
        policy ([`Policy`]): who answers.
        output_dir (`str` or `Path`): where everything goes. Called again with the same policy and settings, what is
            there is kept and what is missing is added.
        data_dir (`str` or `Path`, *optional*): directory of local data. Benchmarks whose file is there are read from it. Of
            the others, sudoku and countdown come with the package, and the rest comes from the hub through
            lm-evaluation-harness.
        decoding (`dict`, *optional*): settings of [`DecodingConfig`].
        seeds (`list[int]`, *optional*, defaults to `[0]`): one measurement each. Without a temperature only the first is
            taken, since all would be the same.
        batch_size (`int`, *optional*, defaults to `32`): answers at a time, on each process.
        limit (`int`, *optional*): most questions of each benchmark.
        allow_code_execution (`bool`, *optional*, defaults to `False`): whether programs that the policy wrote may be
            run on this machine, in the sandbox of `trl_diffusion.rewards.sandbox`.
        about (`dict`, *optional*): what else to write beside the results, such as where the policy came from.
        progress (`bool`, *optional*, defaults to `True`): whether to show progress bars.
        further (`dict[str, TaskBenchmark]`, *optional*): by their names, tasks in addition to the benchmarks.

    Raises:
        ValueError: for a setting that cannot be.
    """

    policy: Policy
    output_dir: str | Path
    data_dir: str | Path | None = None
    decoding: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    batch_size: Annotated[int, AtLeast(1)] = 32
    limit: Annotated[int, AtLeast(1)] | None = None
    allow_code_execution: bool = False
    about: dict[str, Any] = field(default_factory=dict)
    progress: bool = True
    further: dict[str, TaskBenchmark] = field(default_factory=dict)

    def __post_init__(self):
        check_kind("policy", self.policy, Policy, "an open policy (`open_policy(path)`)")
        self.decoding = dict(self.decoding)
        decoding = DecodingConfig.from_dict(self.decoding)
        check_seeds(self.seeds)
        check_fields(self, {"batch_size", "limit"})
        self.output_dir = Path(self.output_dir)
        if not decoding.is_random and len(self.seeds) > 1:
            logger.warning("Without a temperature all seeds give the same answers: only the first is measured.")
            self.seeds = self.seeds[:1]

    def run(self, tasks: list[str]) -> dict[str, Any]:
        """
        Measures the policy on each task with each seed.

        Args:
            tasks (`list[str]`): names out of [`TASK_NAMES`], or of `further`.

        Returns:
            `dict`: what is also in `results.json`, on every process.

        Raises:
            ValueError: before anything is measured, if a task is unknown, needs what is not allowed or not there, or the
                directory holds a policy, or measurements of another policy or with other settings.
        """
        check_tasks(
            [task for task in tasks if task not in self.further],
            self.data_dir,
            self.allow_code_execution,
            bool(self.further),
        )
        tasks = list(dict.fromkeys(tasks))
        fingerprint = fingerprint_policy(self.policy.model)
        settings = {task: self._settings(task, fingerprint) for task in tasks}
        jobs = [(task, seed) for task in tasks for seed in self.seeds]
        check_writable(self._directory, "output_dir")
        for kind in policy_in(self._directory):
            raise ValueError(
                f"{self._directory} holds {kind}, and its `results.json` is that of the training. Choose another `output_dir`."
            )
        for task, seed in jobs:
            self._check_known(task, seed, settings[task])
        (pending,) = broadcast_object_list(
            [[job for job in jobs if not self._is_done(*job)]]
        )  # as the main process sees it
        if processes().is_main_process:
            self._directory.mkdir(parents=True, exist_ok=True)  # or it would be missing when all is measured
        for task, seed in pending:
            measured = self._measure(task, seed)
            if processes().is_main_process:
                assert measured is not None  # there
                self._write(task, seed, settings[task], measured)
        processes().wait_for_everyone()
        results = self._results(tasks)
        if processes().is_main_process:
            write_text(self._directory / "results.json", json.dumps(results, indent=2) + "\n")
            write_text(self._directory / "results.md", markdown(results))
        return results

    def _benchmark(self, task: str) -> Benchmark | None:
        return self.further.get(task) or BENCHMARKS.get(task)

    @property
    def _directory(self) -> Path:
        return Path(self.output_dir)

    def _measure(self, task: str, seed: int) -> Measured | None:
        benchmark = self._benchmark(task)
        if benchmark is not None and benchmark.is_here(self.data_dir):
            rows = benchmark.read(self.data_dir)[: self.limit]
            return measure_local(
                self.policy, benchmark, rows, self.decoding, seed, self.batch_size, progress=self.progress
            )
        return measure_with_harness(
            self.policy,
            HARNESS_TASKS[task],
            self.decoding,
            seed,
            self.batch_size,
            self.limit,
            self.allow_code_execution,
        )

    def _settings(self, task: str, fingerprint: str | None) -> dict[str, Any]:
        """What a measurement depends on."""
        benchmark = self._benchmark(task)
        data = "package" if benchmark is not None and benchmark.packaged is not None else "hub"
        if isinstance(benchmark, TaskBenchmark):
            data = fingerprint_rows(benchmark.read())
        elif benchmark is not None and self.data_dir is not None and benchmark.is_in(self.data_dir):
            data = xxhash.xxh3_128_hexdigest((Path(self.data_dir) / benchmark.file).read_bytes())
        template = self.policy.chat_template_kwargs
        return {
            "policy": fingerprint,
            "diffusion_spec": self.policy.spec.to_dict(),
            "decoding": self.decoding,
            **({"chat_template_kwargs": template} if template else {}),
            "limit": self.limit,
            "data": data,
        }

    def _paths(self, task: str, seed: int) -> tuple[Path, Path]:
        name = measurement_name(task, seed)
        return self._directory / f"{name}.json", self._directory / f"{name}_samples.jsonl"

    def _is_done(self, task: str, seed: int) -> bool:
        return self._paths(task, seed)[0].exists()

    def _check_known(self, task: str, seed: int, settings: dict[str, Any]) -> None:
        path, _ = self._paths(task, seed)
        if not path.exists():
            return
        known = self._read(path)["settings"]
        if not isinstance(known, dict):
            raise ValueError(f"{path}: `settings` must be an object, got {known!r:.80}. {_AGAIN}")
        different = sorted(name for name in {*known, *settings} if known.get(name) != settings.get(name))
        if different:
            changes = "; ".join(f"{name}: {known.get(name)} there, {settings.get(name)} now" for name in different)
            raise ValueError(
                f"{path} holds a measurement that was made otherwise ({changes}). Choose another output directory, or "
                "remove it."
            )

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        """The figures of a measurement that was made before."""
        return read_record(path, (*_OF_A_MEASUREMENT, *asdict(Usage())), _AGAIN)

    def _write(self, task: str, seed: int, settings: dict[str, Any], measured: Measured) -> None:
        """The samples first: a measurement counts as made once its other file is there."""
        path, samples_path = self._paths(task, seed)
        self._directory.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in measured.samples)
        write_text(samples_path, "".join(lines))
        scores = [sample["score"] for sample in measured.samples if sample["score"] is not None]
        accuracy: dict[str, Any] = {"accuracy": statistics.fmean(scores) if scores else None}
        benchmark = self._benchmark(task)
        if (
            isinstance(benchmark, TaskBenchmark)
            and benchmark.task is not None
            and benchmark.task.measured == MEAN_REWARD
        ):
            known = (
                {"mean_reward": statistics.fmean(scores), "interval": list(interval_of(scores, MEAN_REWARD))}
                if scores
                else {}
            )
            accuracy = {"accuracy": None, **known}
        summary = {
            "task": task,
            "seed": seed,
            "settings": settings,
            "questions": len(scores),
            "skipped": len(measured.samples) - len(scores),
            **accuracy,
            **asdict(measured.usage),
        }
        write_text(path, json.dumps(summary, indent=2) + "\n")

    def _results(self, tasks: list[str]) -> dict[str, Any]:
        """What the measurements say, task by task."""
        rows = []
        for task in tasks:
            runs = [self._read(self._paths(task, seed)[0]) for seed in self.seeds]
            rows.append(summarise(task, runs))
        return {
            "policy": self.about,
            "decoding": self.decoding,
            "processes": processes().num_processes,
            "device": str(self.policy.device),
            "batch_size": self.batch_size,
            "tasks": rows,
        }


def measurement_name(task: str, seed: int) -> str:
    """How the names of the files of a measurement begin. Those of a task may hold what a file name does not."""
    return f"{re.sub(r'[^A-Za-z0-9.-]', '_', task).strip('.')}_seed{seed}"


def check_seeds(seeds: list[int]) -> None:
    """Raises a `ValueError` if there is no seed, or one is there twice."""
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"`seeds` must be different numbers, at least one, got {seeds}.")


def check_tasks(
    tasks: list[str],
    data_dir: str | Path | None = None,
    allow_code_execution: bool = False,
    may_be_none: bool = False,
) -> None:
    """
    Raises a `ValueError` if a task is unknown, would run code that nobody has allowed, or comes from the hub while
    lm-evaluation-harness is missing; or if there is no task (unless `may_be_none`), or no directory
    `data_dir`.
    """
    if data_dir is not None and not Path(data_dir).is_dir():
        raise ValueError(f"There is no directory {data_dir} (`data_dir`). Give another one, or leave it out.")
    if not tasks and not may_be_none:
        raise ValueError(f"No task was given; there are {list(TASK_NAMES)}.")
    for task in tasks:
        if task not in TASK_NAMES:
            raise ValueError(f"Unknown task {task!r}; there are {list(TASK_NAMES)}.")
        benchmark, harness = BENCHMARKS.get(task), HARNESS_TASKS.get(task)
        local = benchmark is not None and benchmark.is_here(data_dir)
        chosen = benchmark if local else harness or benchmark
        if chosen is not None and chosen.runs_code and not allow_code_execution:
            raise ValueError(
                f"{task} runs programs that a model wrote on this machine, in a sandbox. If that is what you want, pass "
                "--allow_code_execution (read trl_diffusion.rewards.sandbox on what it leaves open)."
            )
        if local and benchmark is not None:
            if data_dir is not None and not benchmark.is_in(data_dir):
                logger.warning(
                    f"{data_dir} has no {benchmark.file}: the questions of {task} are those of the package."
                )
            continue
        if find_spec("lm_eval") is None:
            raise ValueError(f"{task} from the hub needs lm-evaluation-harness: pip install 'trl-diffusion[eval]'")


# ------------------------------------------------------------------------------------------------------ results


def summarise(task: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """
    Measurements of a task, one for each seed, as one row. The interval is that of the mean share of right answers for as
    many answers as there are questions: answers to the same question are not independent, so more seeds do not narrow it.
    """
    known = [run for run in runs if run["accuracy"] is not None]
    total = Usage()
    for run in runs:
        total.add(Usage(**{name: run[name] for name in ("answers", "tokens", "forwards", "seconds")}))
    row: dict[str, Any] = {
        "task": task,
        "seeds": [run["seed"] for run in runs],
        "questions": runs[0]["questions"],
        "skipped": runs[0]["skipped"],
        "accuracy": None,
        "interval": None,
        "spread": None,
    }
    if known:
        accuracies = [run["accuracy"] for run in known]
        row["accuracy"] = statistics.fmean(accuracies)
        row["interval"] = list(wilson(row["accuracy"], runs[0]["questions"]))
        row["spread"] = statistics.stdev(accuracies) if len(accuracies) > 1 else None
    rewards = [run["mean_reward"] for run in runs if run.get("mean_reward") is not None]
    if rewards:
        row["mean_reward"] = statistics.fmean(rewards)
        # As wide as that of one seed, for the same reason.
        half = statistics.fmean((run["interval"][1] - run["interval"][0]) / 2 for run in runs if run.get("interval"))
        row["interval"] = [row["mean_reward"] - half, row["mean_reward"] + half]
        row["spread"] = statistics.stdev(rewards) if len(rewards) > 1 else None
    row["tokens_per_answer"] = total.tokens / total.answers if total.answers else None
    row["tokens_per_forward"] = total.tokens_per_forward if total.forwards else None
    row["tokens_per_second"] = total.tokens_per_second if total.seconds else None
    return row


def markdown(results: Mapping[str, Any]) -> str:
    """The results as a table."""

    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f} %"

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    rewarded = any("mean_reward" in row for row in results["tasks"])
    heads = ["task", "questions", "seeds", "accuracy", *(["mean reward"] if rewarded else []), "95 % interval"]
    heads += ["std over seeds", "tokens / answer", "tokens / forward", "tokens / s"]
    lines = [heads, ["---"] * len(heads)]
    for row in results["tasks"]:
        spelled = number if "mean_reward" in row else percent
        interval = (" to " if "mean_reward" in row else " - ").join(spelled(end) for end in row["interval"] or [])
        cells = [row["task"], str(row["questions"]), str(len(row["seeds"])), percent(row["accuracy"])]
        cells += [*([number(row.get("mean_reward"))] if rewarded else []), interval]
        cells += [spelled(row["spread"]), number(row["tokens_per_answer"])]
        cells += [number(row["tokens_per_forward"]), number(row["tokens_per_second"])]
        lines.append(cells)
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    about = {**results["policy"], "decoding": json.dumps(results["decoding"]), "device": results["device"]}
    about["processes"], about["batch size"] = results["processes"], results["batch_size"]
    notes = "\n".join(f"- {name}: {value}" for name, value in about.items() if value is not None)
    return f"{table}\n\n{notes}\n"
