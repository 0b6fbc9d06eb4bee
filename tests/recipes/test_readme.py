"""The README's example is run as it is printed, what it claims was measured, and its links hold outside of the repository."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path

import pytest

from trl_diffusion import DTRPOTrainer, links


ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
RESULTS = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def side_of_diff(sign: str) -> str:
    """The script before (`-`) or after (`+`) the README's diff."""
    diff = re.search(r"```diff\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    return "\n".join(line[1:] for line in diff.splitlines() if line[:1] in (" ", sign, ""))


def test_the_swap_is_a_few_lines():
    diff = re.search(r"```diff\n(.*?)```", README.read_text(), re.DOTALL).group(1).splitlines()
    assert sum(line.startswith("+") for line in diff) <= 5
    compile(side_of_diff("-"), "before", "exec")


def test_the_example_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(side_of_diff("+"), "README", "exec"), scope)
    trainer = scope["trainer"]
    assert isinstance(trainer, DTRPOTrainer)
    assert trainer.state.global_step == 3


def test_the_trainer_docstring_example_is_valid(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", DTRPOTrainer.__doc__, re.DOTALL).group(1)
    code = "\n".join(line.removeprefix("    ") for line in code.splitlines())
    monkeypatch.chdir(tmp_path)
    short = code.replace("max_completion_length=17", "max_completion_length=17, max_steps=1, report_to='none'")
    assert short != code
    scope = {}
    exec(compile(short, "docstring", "exec"), scope)
    assert scope["trainer"].state.global_step == 1


# -------------------------------------------------------------------------------------------------- the first screen


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_first_screen_says_what_was_measured(page):
    """Its numbers are those of benchmarks/RESULTS.md, and it shows a moving picture."""
    screen = (ROOT / page).read_text(encoding="utf-8").partition("\n## ")[0]
    before, after = re.search(r"\| mean \| ([\d.]+ %) \| ([\d.]+ %) \| \*\*\+77", RESULTS).groups()
    assert f"solves {before} of" in " ".join(screen.split()) and f"**{after}**" in screen
    gpu = RESULTS.partition("\n## On one GPU\n")[2]
    fast, slow = (
        re.search(rf"\| {name} \| ([\d.]+)", gpu)[1] for name in (r"\*\*dTRPO\*\*", "exact trajectory, 32 steps")
    )
    assert f"**{float(fast):.1f} seconds instead of {slow}**" in screen
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+\.gif)\)", screen)
    assert (ROOT / page).parent.joinpath(picture).stat().st_size < 1_000_000
    assert len(screen.split("```")) == 1 and not set(re.findall(r"\b(canvas|spec|drawn)\b", screen))


def test_the_table_of_costs_is_that_of_the_results():
    """Ratios of the README, in the order of its rows."""
    table = README.read_text(encoding="utf-8").partition("## What an update costs")[2].partition("\n## ")[0]
    cells = re.findall(r"\| ([\d.]+) \| ([\d.]+) \|$", table, re.MULTILINE)
    assert len(cells) == 6
    cpu, gpu = (part.partition("\n\n")[0] for part in RESULTS.split("| dTRPO's time divided by that of")[1:])
    names = ("exact trajectory", "ELBO with 8 masks", "block-diffusion SFT", "autoregressive SFT",
             "autoregressive SFT, head on response tokens only", "autoregressive SFT, shared prompt")  # fmt: skip
    for name, (on_cpu, on_gpu) in zip(names, cells, strict=True):
        measured = [re.search(rf"^\| {name} \| ([\d.]+) \|", part, re.MULTILINE)[1] for part in (cpu, gpu)]
        assert [f"{float(one):.2f}" for one in measured] == [on_cpu, on_gpu], name


def test_badges_say_what_the_project_says():
    """They are files of the repository, so that nothing is fetched to show them."""
    pytest.importorskip("matplotlib", reason="needs the extra `viz`")
    badges = runpy.run_path(str(ROOT / "docs" / "pictures.py"))["badges"]()
    shown = re.findall(
        r"^\[!\[([^\]]+)\]\(docs/pictures/(\w+\.svg)\)", README.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert {name for _, name in shown} == set(badges)
    for alternative, name in shown:
        assert (ROOT / "docs" / "pictures" / name).read_text(encoding="utf-8") == badges[name]
        label, value = re.search(r"<title>(.*): (.*)</title>", badges[name]).groups()
        assert value.split()[-1].replace("-", " ") in alternative or label == "paper"


# ------------------------------------------------------------------------------------------ away from the repository


def test_links_are_absolute_where_the_repository_is_not():
    """In the metadata, and in what programs print. The address is that of `pyproject.toml`, also in the README."""
    repository = PROJECT["urls"]["Repository"]
    text = README.read_text(encoding="utf-8")
    made = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["absolute"](text, repository)
    found = re.findall(r"\]\(([^)\s]+)\)", made)
    assert len(found) > 25 and all(link.startswith("https://") for link in found)
    assert (
        f"![License: Apache 2.0]({repository}/raw/main/docs/pictures/license.svg)]({repository}/blob/main/LICENSE)"
        in made
    )
    assert len(made.splitlines()) == len(text.splitlines())
    assert (
        repository == links.REPOSITORY
        and f"git clone {repository}\n" in text
        and repository in text.partition("@software")[2]
    )


def test_where_somebody_reads_on(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert links.link("docs/quickstart.md#5-train-it-on-your-task") == "docs/quickstart.md"
    monkeypatch.chdir(tmp_path)
    assert Path(links.link("docs/quickstart.md")).samefile(ROOT / "docs" / "quickstart.md")
    monkeypatch.setattr(links, "__file__", str(tmp_path / "trl_diffusion" / "links.py"))  # as installed
    assert links.link("docs/quickstart.md#1-install") == f"{links.REPOSITORY}/blob/main/docs/quickstart.md#1-install"
