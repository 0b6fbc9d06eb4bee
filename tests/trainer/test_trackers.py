"""
Tables and pictures reach the trackers that `report_to` names.

Stand-ins for the trackers are tested everywhere. Where the packages are installed, a training reports to them, offline, and they
are asked what they have got.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from accelerate import PartialState
from transformers import TrainerCallback
from transformers.integrations import TrackioCallback
from trl.extras import profiling
from trl.trainer import grpo_trainer

from tests.trainer.conftest import codes, make_dataset
from trl_diffusion import DiffusionSFTConfig, DTRPOConfig
from trl_diffusion.trainer import callbacks, options, trackers
from trl_diffusion.trainer.callbacks import TrajectoryCallback, TrajectoryTableCallback
from trl_diffusion.trainer.trackers import Trackers, as_markdown


TABLE = pd.DataFrame({"prompt": ["a", "b"], "reward": [0.25, float("nan")]})


class StandIn:
    """A tracker that keeps what it gets, with the signatures of wandb and trackio that are used here."""

    def __init__(self, name: str):
        self.name, self.logged = name, []
        self.run: object | None = object()
        self.__spec__ = ModuleSpec(name, None)  # transformers looks for it
        self.context_vars = SimpleNamespace(current_run=SimpleNamespace(get=lambda: self.run))
        self.Table = lambda dataframe: dataframe.copy()
        self.Image = lambda path: Path(path)

    def log(self, entries, step=None):
        if self.run is None:
            raise RuntimeError(f"{self.name} has no run")
        self.logged.append(entries)

    def entries(self, name: str) -> list:
        return [one[name] for one in self.logged if name in one]


class Writer(TrainerCallback):
    """A stand-in for the callback of transformers that holds TensorBoard's writer."""

    def __init__(self):
        self.logged: list[tuple] = []
        self.tb_writer = self

    def add_text(self, tag, text_string, global_step):
        self.logged.append((tag, text_string, global_step))

    def add_image(self, tag, img_tensor, global_step, dataformats):
        assert dataformats == "HWC" and img_tensor.shape[2] == 3 and 0 <= img_tensor.min() < img_tensor.max() <= 1
        self.logged.append((tag, img_tensor, global_step))

    def flush(self):
        pass


@pytest.fixture
def standing_in(monkeypatch) -> dict[str, StandIn]:
    """Stand-ins for wandb and trackio, also where TRL looks for them."""
    found = {name: StandIn(name) for name in ("wandb", "trackio")}
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
        for place in (grpo_trainer, profiling):
            monkeypatch.setattr(place, name, module, raising=False)
            monkeypatch.setattr(place, f"is_{name}_available", lambda: True)
    return found


def fake_trainer(report_to: list[str], *others, main: bool = True):
    """What `Trackers` needs of a trainer, after 7 updates."""
    return SimpleNamespace(
        state=SimpleNamespace(global_step=7, is_world_process_zero=main),
        args=SimpleNamespace(report_to=report_to),
        callback_handler=SimpleNamespace(callbacks=list(others)),
    )


@pytest.fixture
def picture(tmp_path) -> Path:
    image = pytest.importorskip("matplotlib.image")
    image.imsave(tmp_path / "picture.png", [[0.0, 1.0]], cmap="gray")
    return tmp_path / "picture.png"


# --------------------------------------------------------------------------------------------------------- stand-ins


def test_every_tracker_gets_tables_and_pictures(standing_in, picture):
    writer = Writer()
    sending = Trackers(fake_trainer(["wandb", "trackio", "tensorboard", "mlflow"], TrainerCallback(), writer))
    sending.send_table("eval/table", TABLE)
    sending.send_pictures("picture", [picture])
    sending.send_pictures("pictures", [picture, picture])
    for module in standing_in.values():
        assert all(entry["train/global_step"] == 7 for entry in module.logged)
        pd.testing.assert_frame_equal(module.logged[0]["eval/table"], TABLE)
        assert module.logged[1]["picture"] == picture
    assert standing_in["wandb"].logged[2]["pictures"] == [picture, picture]
    assert {"pictures", "pictures/1"} < set(standing_in["trackio"].logged[2])
    assert [(tag, step) for tag, _, step in writer.logged] == [
        (name, 7) for name in ("eval/table", "picture", "pictures", "pictures/1")
    ]
    assert not sending.failed


def test_nothing_is_sent_where_nobody_asks(standing_in, picture):
    """Without `report_to`, on another process than the main one, and before a tracker has a run."""
    writer = Writer()
    every = ["wandb", "trackio", "tensorboard"]
    for trainer in (fake_trainer([], writer), fake_trainer(every, writer, main=False)):
        Trackers(trainer).send_table("table", TABLE)
        Trackers(trainer).send_pictures("picture", [picture])
    for module in standing_in.values():
        module.run = None
    Trackers(fake_trainer(every)).send_table("table", TABLE)
    assert writer.logged == [] and all(module.logged == [] for module in standing_in.values())


def test_a_tracker_that_fails_is_a_warning(standing_in, caplog):
    PartialState()  # which accelerate's loggers need

    def fail(entries):
        raise OSError("no space\nleft on device")

    standing_in["wandb"].log = fail
    sending = Trackers(fake_trainer(["wandb", "trackio"]))
    for _ in range(2):
        sending.send_table("table", TABLE)
    assert len(standing_in["trackio"].logged) == 2 and sending.failed == {"wandb"}
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "wandb did not take 'table' (OSError: no space left on device)" in warning and "\n" not in warning


class _Cells(HTMLParser):
    """The texts of the cells of a table in HTML."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag in ("th", "td"):
            self.found.append("")
        elif tag == "br":
            self.found[-1] += "\n"

    def handle_data(self, data):
        if self.found and data.strip():
            self.found[-1] += data


def test_markdown_shows_texts_as_they_are():
    """Rendered as TensorBoard does, by the package Markdown with tables."""
    markdown = pytest.importorskip("markdown", reason="Markdown is not installed")
    texts = ["a | b", "*4* * 3_2_", "<answer>&amp;</answer>", "# one\ntwo", "`x` \\ [y](z) {~}", "0 2 | ."]
    page = markdown.markdown(as_markdown(pd.DataFrame({"the | text": texts})), extensions=["tables"])
    assert _Cells(page).found == ["the | text", *texts]


def test_markdown_of_a_long_table(monkeypatch):
    monkeypatch.setattr(trackers, "MOST_ROWS", 2)
    text = as_markdown(pd.DataFrame({"n": [1, 2, 3, 4], "x": [0.123456, 1.0, 2.0, 3.0]}))
    assert text.splitlines() == [
        "| n | x |",
        "| --- | --- |",
        "| 1 | 0.1235 |",
        "| 2 | 1 |",
        "",
        "2 more rows are left out.",
    ]


@pytest.mark.parametrize("kind", [DTRPOConfig, DiffusionSFTConfig])
def test_a_tracker_that_is_not_installed(kind, monkeypatch, tmp_path):
    """It is found before any weights are loaded."""
    monkeypatch.setitem(trackers._INSTALLED, "trackio", lambda: False)
    monkeypatch.setitem(trackers._INSTALLED, "wandb", lambda: True)
    for names in ("trackio", ["wandb", "trackio"]):
        with pytest.raises(
            ValueError, match="^`report_to` names 'trackio', which is not installed: `pip install trackio`"
        ):
            kind(str(tmp_path), report_to=names, bf16=False)
    assert options.check_trackers("none") is None and options.check_trackers(None) is None


# ---------------------------------------------------------------------------------------------------------- a training


class Starting(TrackioCallback):
    """Opens the runs of stand-ins as transformers does: with the first log, or when training begins. They end with training."""

    _trackio = None

    def __init__(self, modules):
        self.modules = modules

    def setup(self, args, state, model, **kwargs):
        for module in self.modules:
            module.run = module.run or object()

    def on_log(self, args, state, control, model=None, **kwargs):
        self.setup(args, state, model)

    on_train_begin = on_log

    def on_train_end(self, args, state, control, **kwargs):
        for module in self.modules:
            module.run = None


@pytest.mark.slow
def test_what_a_training_sends(make_trainer, standing_in, tmp_path):
    modules = standing_in.values()
    for module in modules:
        module.run = None
    trainer = make_trainer(
        max_steps=2, log_completions=True, num_completions_to_print=1, log_trajectories=3, eval_strategy="steps", eval_steps=2,
        per_device_eval_batch_size=4, kwargs={"eval_dataset": make_dataset(2), "callbacks": [Starting(modules)]},
    )  # fmt: skip
    trainer.args.report_to = ["wandb", "trackio"]
    trainer.evaluate()  # before there is a run
    trainer.train()
    assert all(module.run is None for module in modules)
    trainer.predict(make_dataset(1))
    for module in modules:
        assert [len(table) for table in module.entries("test/completions")] == [4]
        assert len(module.entries("completions")) == 2  # none again at the end of training
        assert [len(table) for table in module.entries("eval/completions")] == [8, 8]
        assert [len(table) for table in module.entries("trajectories")] == [3, 3]
        assert [table["step"].tolist() for table in module.entries("eval/trajectories")] == [[0] * 3, [2] * 3]
        names = [path.name for path in module.entries("eval/trajectory")]
        assert names == ["eval_000000.png", "eval_000002.png"]
    last = standing_in["wandb"].entries("trajectories")[-1]
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "trajectories" / "step_000002.parquet"), last)
    completions = standing_in["wandb"].entries("completions")[-1]
    assert last["response"].tolist() == completions["completion"].tolist()[:3]
    assert last["codes"].tolist() == pytest.approx(codes(last["response"]), rel=1e-6)
    assert last["advantage"].tolist() == pytest.approx(completions["advantage"].tolist()[:3], rel=1e-6)
    log = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    whole = trainer.seen.trajectories
    assert last["tokens"].tolist() == whole.completion_lengths.tolist()[:3]
    assert (last["passes"] <= last["tokens"]).all() and (
        last["passes"] >= last["tokens"] / 2
    ).all()  # 2 tokens at a step
    assert log["diffusion/tokens_per_step"] <= 2


@pytest.mark.slow
def test_the_table_of_a_training_is_of_its_rollout(make_trainer, tmp_path):
    """All of it: the means of the table are the metrics of the log."""
    trainer = make_trainer(max_steps=1, log_trajectories=100)
    trainer.train()
    table = pd.read_parquet(tmp_path / "trajectories" / "step_000001.parquet")
    (log,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(table) == 4 and table["codes"].mean() == pytest.approx(log["rewards/codes/mean"], rel=1e-5)
    assert table["passes"].mean() == pytest.approx(log["diffusion/steps_per_response"], rel=1e-6)
    assert table["tokens"].mean() == pytest.approx(log["completions/mean_length"], rel=1e-6)
    assert table["tokens"].sum() / table["passes"].sum() == pytest.approx(log["diffusion/tokens_per_step"], rel=1e-6)
    assert 1 - table["ended"].mean() == pytest.approx(log["completions/clipped_ratio"], rel=1e-6, abs=1e-6)


def test_settings_of_the_callbacks(make_trainer, monkeypatch, caplog):
    trainer = make_trainer()
    with pytest.raises(ValueError, match="`?rows`? must be a whole number of at least 1, got 0"):
        TrajectoryTableCallback(trainer, rows=0)
    with pytest.raises(ValueError, match="log_trajectories.*-1"):
        make_trainer(log_trajectories=-1)

    def kinds(trainer) -> list[type]:
        ours = (TrajectoryCallback, TrajectoryTableCallback)
        return [type(one) for one in trainer.callback_handler.callbacks if isinstance(one, ours)]

    assert kinds(trainer) == []
    assert kinds(make_trainer(log_trajectories=2)) == [TrajectoryTableCallback, TrajectoryCallback]
    monkeypatch.setattr(callbacks, "find_spec", lambda name: None)
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    assert kinds(make_trainer(log_trajectories=2, kwargs={"eval_dataset": make_dataset(1)}, **evaluated)) == [
        TrajectoryTableCallback
    ]
    assert "without matplotlib" in caplog.text


# ----------------------------------------------------------------------------------------------------- the real packages


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_stand_in_is_called_as_the_package(name):
    module = pytest.importorskip(name, reason=f"{name} is not installed")
    inspect.signature(module.Table.__init__).bind(None, dataframe=TABLE)
    inspect.signature(module.Image.__init__).bind(None, "picture.png")
    if name == "wandb":
        assert module.run is None
        inspect.signature(importlib.import_module("wandb.sdk.wandb_run").Run.log).bind(None, {"a": 1})
    else:
        assert module.context_vars.current_run.get() is None
        inspect.signature(module.log).bind({"a": 1})


def test_the_writer_is_called_as_the_package():
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
    inspect.signature(writer.add_text).bind(None, "a", "b", 1)
    inspect.signature(writer.add_image).bind(None, "a", None, 1, dataformats="HWC")
    inspect.signature(writer.flush).bind(None)


TRACKERS = [name for name in ("wandb", "trackio", "tensorboard") if find_spec(name) is not None]
TABLES = {"trajectories", "eval/completions", "eval/trajectories"}


@pytest.mark.slow
@pytest.mark.skipif(not TRACKERS, reason="neither wandb nor trackio nor tensorboard is installed")
def test_a_command_reports_to_the_packages(tmp_path):
    """With an evaluation, tables and pictures, as `report_to` says; and nothing leaves this machine."""
    command = (
        "train --max_steps 2 --per_device_train_batch_size 8 --num_generations 4 --eval_size 4 --train_size 50 --logging_steps 1 "
        "--log_completions true --num_completions_to_print 1 --log_trajectories 3 --eval_strategy steps --eval_steps 1 "
        "--per_device_eval_batch_size 8 --save_strategy no --project mine --output_dir out --report_to"
    )
    environment = {
        **os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    subprocess.run(
        [sys.executable, "-m", "trl_diffusion", *command.split(), *TRACKERS], cwd=tmp_path, env=environment, check=True
    )
    readers = {"wandb": _in_wandb, "trackio": _in_trackio, "tensorboard": _in_tensorboard}
    for name in TRACKERS:
        tables, pictures, numbers = readers[name](tmp_path)
        expected = {**dict.fromkeys(TABLES, 2), **({} if name == "tensorboard" else {"completions": 2})}
        assert tables == expected, name
        assert pictures == {"eval/trajectory": 2}, name
        assert {"train/loss", "train/diffusion/effective_sample_size", "eval/reward"} <= numbers, name


def _count(names) -> dict[str, int]:
    return {name: list(names).count(name) for name in names}


def _entries(path: Path) -> Iterator[bytes]:
    """The entries of an offline run of wandb, which is in LevelDB's format of a log: blocks of 32 KiB, in which each part of an entry has
    a checksum, a length and a kind (1: whole, 2: first, 3: middle, 4: last)."""
    data, place, parts = path.read_bytes(), 7, []  # after the header of wandb
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # the rest of a block is too short for a part
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


def _in_wandb(directory: Path) -> tuple[dict, dict, set]:
    """Of a run that was written offline."""
    records = importlib.import_module("wandb.proto.wandb_internal_pb2")
    (path,) = directory.glob("wandb/offline-run-*/*.wandb")
    tables, pictures, numbers = [], [], set()
    for data in _entries(path):
        record = records.Record()
        record.ParseFromString(data)
        for item in record.history.item:  # of a table or a picture, each fact is an item
            name, _, fact = ("/".join(item.nested_key) or item.key).rpartition("/")
            value = json.loads(item.value_json)
            if fact == "path":
                assert (path.parent / "files" / value).is_file()
            tables += [name] * (fact == "_type" and value == "table-file")
            pictures += [name] * (fact == "_type" and value == "image-file")
            numbers.add(f"{name}/{fact}")
    return _count(tables), _count(pictures), numbers


def _in_trackio(directory: Path) -> tuple[dict, dict, set]:
    """Of a run on this machine, read from trackio's database."""
    import sqlite3

    rows = sqlite3.connect(directory / "trackio" / "mine.db").execute("select metrics from metrics").fetchall()
    tables, pictures, numbers = [], [], set()
    for (text,) in rows:
        for name, value in json.loads(text).items():
            kind = value.get("_type") if isinstance(value, dict) else None
            tables += [name] * (kind == "trackio.table")
            pictures += [name] * (kind == "trackio.image")
            numbers |= {name} if kind is None else set()
    assert len(list((directory / "trackio").rglob("*.png"))) == len(pictures)
    return _count(tables), _count(pictures), numbers


def _in_tensorboard(directory: Path) -> tuple[dict, dict, set]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (directory / "out" / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    tags, ending = events.Tags(), "/text_summary"
    tables = {
        name.removesuffix(ending): len(events.Tensors(name)) for name in tags["tensors"] if name.endswith(ending)
    }
    texts = {name: count for name, count in tables.items() if name not in ("args", "model_config")}
    return texts, {name: len(events.Images(name)) for name in tags["images"]}, set(tags["scalars"])
