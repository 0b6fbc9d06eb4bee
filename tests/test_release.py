"""What a release says of itself: its version, how it is cited, what changed, and what an issue is asked for."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import trl_diffusion
from trl_diffusion import cli
from trl_diffusion.commands import adapt, collect, evaluate, sft, train
from trl_diffusion.commands.parser import starting_parser
from trl_diffusion.links import REPOSITORY


ROOT = Path(__file__).resolve().parents[1]
GITHUB = ROOT / ".github"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CHANGELOG = (ROOT / "docs" / "changelog.md").read_text(encoding="utf-8")

# The schema of the Citation File Format, version 1.2.0: what must be there, and what may.
REQUIRED = {"authors", "cff-version", "message", "title"}
OPTIONAL = {
    "abstract", "commit", "contact", "date-released", "doi", "identifiers", "keywords", "license", "license-url", "preferred-citation",
    "references", "repository", "repository-artifact", "repository-code", "type", "url", "version",
}  # fmt: skip
ENTITY = {
    "address", "alias", "city", "country", "date-end", "date-start", "email", "fax", "location", "name", "orcid", "post-code", "region",
    "tel", "website",
}  # fmt: skip


def load(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_citation():
    found = load(ROOT / "CITATION.cff")
    assert REQUIRED <= found.keys() <= REQUIRED | OPTIONAL
    assert found["cff-version"] == "1.2.0" and found["type"] == "software"
    assert found["authors"] and all(author.keys() <= ENTITY and author["name"] for author in found["authors"])
    assert found["version"] == trl_diffusion.__version__ and found["license"] == PROJECT["license"]
    assert found["repository-code"] == found["url"] == REPOSITORY
    assert set(found["keywords"]) == set(PROJECT["keywords"])
    assert f"title  = {{{found['title']}}}".replace("_", r"\_") in (ROOT / "README.md").read_text().replace(
        "{TRL}", "TRL"
    )


def test_the_changelog_begins_with_this_version():
    assert re.match(r"\d+\.\d+\.\d+", trl_diffusion.__version__)
    headings = re.findall(r"^## (\S+?),?( .*)?$", CHANGELOG, re.MULTILINE)
    assert headings[0][0] == trl_diffusion.__version__


def option_names() -> set[str]:
    """The options of all commands that are launched."""
    kinds = [kind for command in (train, sft, collect, evaluate, adapt) for kind in command.KINDS]
    names = {name for kind in kinds for name in kind.__dataclass_fields__}
    return names | {one.dest for name in cli.LAUNCHED for one in starting_parser(name).options()}


def test_what_the_changelog_names_is_there():
    """Commands, options, settings, classes and functions of the newest version; what is gone is gone."""
    newest = CHANGELOG.split("\n## ")[1]
    gone, rest = newest.partition("### What breaks")[2].partition("\n###")[::2]
    options, names = option_names(), set(re.findall(r"`([^`\n]+)`", rest))
    commands = {name.split()[1] for name in names if name.startswith("trl-diffusion ")}
    assert commands and commands <= cli.LAUNCHED.keys() | cli.DIRECT.keys()
    given = {re.split(r"[ =]", name.strip())[0][2:] for name in names if name.startswith("--")}
    assert given and given - {"help", "help-all", "machine_rank"} <= options, given - options
    classes = {name for name in names if re.fullmatch(r"(?:[A-Z]+[a-z]+)+[A-Za-z]*", name) and name != "TRL"}
    assert classes and all(hasattr(trl_diffusion, name) for name in classes), classes
    for old in ("decoding_strategy", "confidence_threshold", "step_schedule"):
        assert f"`{old}`" in gone and old not in options


def test_versions_that_are_named_are_those_of_the_project():
    """In the changelog and in the README: the highest version is the one below the bound of pyproject.toml."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    bounded = [re.fullmatch(r"(\w+)>=([\d.]+),.*?<(\d+)\.(\d+)", one) for one in PROJECT["dependencies"] if "<" in one]
    assert [one and one[1] for one in bounded] == ["transformers", "trl"]
    for one in filter(None, bounded):
        span = f"{one[2]} to {one[3]}.{int(one[4]) - 1}"
        assert span in CHANGELOG and span in readme, span
    pythons = [
        one.rpartition(" ")[2]
        for one in PROJECT["classifiers"]
        if one.startswith("Programming Language :: Python :: 3.")
    ]
    assert pythons[0] == PROJECT["requires-python"].removeprefix(">=")
    tested = re.search(r"^\| Python \| .*? \| (.*) \|$", readme, re.MULTILINE)
    assert tested and set(re.findall(r"3\.\d+", tested[1])) == set(pythons)  # what is claimed was tried


# ---------------------------------------------------------------------------------------------------------------- GitHub

FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
KINDS = {"markdown", "textarea", "input", "dropdown", "checkboxes"}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_for_issues(path):
    """A form has what GitHub's schema of forms wants, and asks for what `trl-diffusion doctor` prints."""
    form = load(path)
    assert (
        {"name", "description", "body"}
        <= form.keys()
        <= {"name", "description", "body", "labels", "title", "assignees"}
    )
    asked = [one for one in form["body"] if one["type"] != "markdown"]
    assert asked and {one["type"] for one in form["body"]} <= KINDS
    assert len({one["id"] for one in asked}) == len({one["attributes"]["label"] for one in asked}) == len(asked)
    assert all(one.keys() <= {"type", "id", "attributes", "validations"} for one in form["body"])
    assert (
        any(one["attributes"]["label"] == "What `trl-diffusion doctor` prints" for one in asked)
        and "doctor" in cli.DIRECT
    )
    assert any(one.get("validations", {}).get("required") for one in asked)


def test_addresses_for_issues():
    assert [path.stem for path in FORMS] == ["bug", "family", "question"]
    texts = [path.read_text() for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml")]
    found = re.findall(rf"{re.escape(REPOSITORY)}/blob/main/([\w./-]+)", "".join(texts))
    assert found and all((ROOT / path).is_file() for path in found)


def test_lanes():
    """A workflow runs what there is: targets of the Makefile and `.ci/run`, on versions of Python that the project names."""
    lanes = {path.stem: load(path) for path in (GITHUB / "workflows").glob("*.yml")}
    assert lanes.keys() == {"ci", "newest"}
    steps = [step for lane in lanes.values() for job in lane["jobs"].values() for step in job["steps"]]
    for command in (step["run"] for step in steps if "run" in step):
        target = re.fullmatch(r"make ([a-z-]+)", command)
        assert command == "bash .ci/run" or (target and f"\n{target[1]}:" in (ROOT / "Makefile").read_text()), command
    assert "schedule" in lanes["newest"][True]  # YAML reads `on` as a truth value
    assert all(job["timeout-minutes"] <= 90 for lane in lanes.values() for job in lane["jobs"].values())
    (named,) = re.findall(
        r"^## What runs when$(.*?)^## ", (ROOT / "docs" / "contributing.md").read_text(), re.M | re.S
    )
    assert all(f"`.github/workflows/{name}.yml`" in named for name in lanes)
