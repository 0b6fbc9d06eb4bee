"""A mistyped path is answered before the hub is asked at length; what is on the hub, or in its cache, is left to its client."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from datasets import Dataset
from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError, RepositoryNotFoundError

from trl_diffusion import DTRPOConfig, DTRPOTrainer, tiny_policy_path
from trl_diffusion.commands import collect, evaluate, generate, plan, train
from trl_diffusion.policies import places
from trl_diffusion.policies.places import check_there
from trl_diffusion.policies.policy import open_policy


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A directory with `outputs/tiny_sudoku`, an empty cache of the hub's, and a hub that counts as on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "tiny_sudoku").mkdir(parents=True)
    monkeypatch.setattr(places.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(places.constants, "HF_HUB_OFFLINE", False)
    return tmp_path


@pytest.fixture
def asked(monkeypatch):
    """What the hub is asked; it answers with `asked.answer`, which may be an error."""
    found = SimpleNamespace(urls=[], answer=None)

    def ask(url, token=None, timeout=None):
        assert 0 < timeout <= 10
        found.urls.append(url)
        if found.answer is not None:
            raise found.answer

    monkeypatch.setattr(places, "get_hf_file_metadata", ask)
    return found


def refusal(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    error.args = ("no",)
    return error


def test_what_can_only_be_a_path_asks_nobody(asked):
    for path in ("outputs/tiny_sudok", "./nothing", "/nowhere/at/all", "a/b/c", "~/model", "nothing/"):
        with pytest.raises(FileNotFoundError, match=f"^There is no directory {path}\\.") as error:
            check_there(path)
        assert ("Is outputs/tiny_sudoku meant?" in str(error.value)) == (path == "outputs/tiny_sudok")
    check_there("outputs/tiny_sudoku")
    with pytest.raises(FileNotFoundError, match="^The directory outputs holds no config.json; it holds tiny_sudoku.$"):
        check_there("outputs", "config.json")
    assert not asked.urls


@pytest.mark.parametrize("name", ["owner/name", "name"])
def test_what_may_be_on_the_hub_is_asked_for_once(asked, here, name):
    for answer, message in (
        (
            OSError("Name or service not known"),
            "nothing of this name in the hub's cache, and the hub cannot be reached .*Name or",
        ),
        (refusal(RepositoryNotFoundError), "and no model of this name on the hub, or a private one"),
    ):
        asked.answer = answer
        with pytest.raises(FileNotFoundError, match=f"^There is no directory {name}, {message}"):
            check_there(name)
    for answer in (None, refusal(GatedRepoError), refusal(RemoteEntryNotFoundError)):
        asked.answer = answer
        check_there(name)
    assert len(asked.urls) == 5 and all(f"/{name}/resolve/" in url for url in asked.urls)
    asked.answer = AssertionError("asked")
    snapshot = here / "cache" / f"models--{name.replace('/', '--')}" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    check_there(name)


def test_offline_nobody_is_asked(asked, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"There is no directory owner/name, and nothing .* is not asked"):
        check_there("owner/name", local_files_only=True)
    monkeypatch.setattr(places.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"is not asked \(HF_HUB_OFFLINE\)"):
        check_there("owner/name")
    assert not asked.urls


def test_everything_that_opens_a_checkpoint_says_so(asked, here, capsys, monkeypatch):
    lost = "outputs/tiny_sudok"
    options = ["--output_dir", "out", "--bf16", "false"]
    for module, words in (
        (train, ["--model_name_or_path", lost, *options]),
        (train, ["--tokenizer_name_or_path", lost, *options]),
        (collect, ["--model_name_or_path", lost, "--output_dir", "out"]),
        (collect, ["--adapter_name_or_path", lost, "--output_dir", "out"]),
        (evaluate, ["--tasks", "sudoku", "--data_dir", ".", "--model_name_or_path", lost]),
        (generate, ["x", "--model", lost]),
        (generate, ["x", "--adapter", lost]),
        (plan, [lost]),
    ):
        (here / "sudoku").mkdir(exist_ok=True)
        (here / "sudoku" / "4x4_test.csv").write_text("Puzzle\n3102200002100320\n")
        try:
            code = module.main(words)
        except SystemExit as end:
            code = end.code
        line = capsys.readouterr().err.splitlines()[-1]
        assert code == 2 and line == f"error: There is no directory {lost}. Is outputs/tiny_sudoku meant?"
    args = DTRPOConfig("out", bf16=False)
    with pytest.raises(FileNotFoundError, match=f"There is no directory {lost}"):
        DTRPOTrainer(tiny_policy_path(), lost, args, Dataset.from_dict({"prompt": ["1+1="]}))
    with pytest.raises(FileNotFoundError, match="outputs/tiny_sudoku holds no adapter_config.json; it holds nothing"):
        open_policy(adapter="outputs/tiny_sudoku")
    assert not asked.urls
