"""
What the site has beside the pages of `docs`.

- `benchmarks/RESULTS.md` and its pictures become a part of the site, under the links that they have in the repository.
- Notebooks become pages, under the links that they have in the repository (`docs/notebooks.py`).
- Formulas are typeset by KaTeX while the site is built: pages need its style sheet and its fonts, which the site serves, and no
  JavaScript. With the environment variable `DOCS_PLAIN_FORMULAS` formulas stay TeX, and KaTeX is not needed.
- Names of TRL, transformers and other projects lead to the pages of those projects.
- The address of the repository is that of `pyproject.toml`. The theme does not ask its host how many stars it has.
- A picture leads to itself in full size.
- Names in a table are broken after `_`, `/` and `.`, if they are too long for it.
- A line of code that is wider than its box is an error.
"""

from __future__ import annotations

import html
import json
import logging
import os
import re
import runpy
import subprocess
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File


DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks"
NOTEBOOKS = runpy.run_path(str(DOCS / "notebooks.py"))
KATEX = DOCS / "node_modules" / "katex" / "dist"
HUGGING_FACE = "https://huggingface.co/docs"
ELSEWHERE = {
    "accelerate.Accelerator": "accelerate/package_reference/accelerator#accelerate.Accelerator",
    "datasets.Dataset": "datasets/package_reference/main_classes#datasets.Dataset",
    "datasets.IterableDataset": "datasets/package_reference/main_classes#datasets.IterableDataset",
    "peft.PeftModel": "peft/package_reference/peft_model#peft.PeftModel",
    "transformers.BitsAndBytesConfig": "transformers/main_classes/quantization#transformers.BitsAndBytesConfig",
    "transformers.PretrainedConfig": "transformers/main_classes/configuration",
    "transformers.PreTrainedModel": "transformers/main_classes/model#transformers.PreTrainedModel",
    "transformers.PreTrainedTokenizerBase": "transformers/internal/tokenization_utils",
    "transformers.Trainer": "transformers/main_classes/trainer#transformers.Trainer",
    "transformers.Trainer.evaluate": "transformers/main_classes/trainer#transformers.Trainer.evaluate",
    "transformers.Trainer.predict": "transformers/main_classes/trainer#transformers.Trainer.predict",
    "transformers.Trainer.save_model": "transformers/main_classes/trainer#transformers.Trainer.save_model",
    "transformers.Trainer.train": "transformers/main_classes/trainer#transformers.Trainer.train",
    "transformers.TrainerCallback": "transformers/main_classes/callback#transformers.TrainerCallback",
    "transformers.TrainingArguments": "transformers/main_classes/trainer#transformers.TrainingArguments",
    "trl.DPOConfig": "trl/dpo_trainer#trl.DPOConfig",
    "trl.GRPOConfig": "trl/grpo_trainer#trl.GRPOConfig",
    "trl.GRPOTrainer": "trl/grpo_trainer#trl.GRPOTrainer",
    "trl.SFTConfig": "trl/sft_trainer#trl.SFTConfig",
    "trl.SFTTrainer": "trl/sft_trainer#trl.SFTTrainer",
}
# Where a name between backticks may be broken.
NAME = re.compile(r"(?<=[\w])([_/.])(?=\w[^<>]*</code>)")
CODE_WIDTH = 80  # characters that a box of the theme shows in the narrowest window with both side bars, of 1220 pixels
# As `pymdownx.arithmatex` writes a formula: \(...\) inside of a line, \[...\] on lines of its own.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def repository(project: dict[str, Any]) -> str | None:
    """The address of the repository, as the metadata of the package has it. `None` if it has none."""
    urls = {name.lower(): url for name, url in project.get("urls", {}).items()}
    return next((urls[name] for name in ("repository", "source", "homepage") if name in urls), None)


def on_config(config):
    metadata = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))
    config.repo_url, config.repo_name = repository(metadata["project"]), "Repository"
    for name, page in ELSEWHERE.items():
        config.plugins["autorefs"].register_url(name, f"{HUGGING_FACE}/{page}")
    if os.environ.get("DOCS_PLAIN_FORMULAS"):
        logging.getLogger(__name__).warning("DOCS_PLAIN_FORMULAS is set: formulas stay TeX.")
    elif not KATEX.is_dir():
        raise PluginError(
            "KaTeX is not in docs/node_modules. Run `make docs` or `npm ci --prefix docs`. "
            "Or set DOCS_PLAIN_FORMULAS=1, which leaves formulas as TeX."
        )
    else:
        config.extra_css.append("katex/katex.min.css")
    return config


def on_files(files, config):
    for path in (RESULTS / "RESULTS.md", *sorted(RESULTS.glob("*.png"))):
        files.append(File.generated(config, f"benchmarks/{path.name}", abs_src_path=str(path)))
    for path in NOTEBOOKS["NOTEBOOKS"]:
        page, pictures = NOTEBOOKS["page"](path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page))
        files.append(File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path)))
        for name, data in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=data))
    if "katex/katex.min.css" in config.extra_css:
        style = re.sub(r",url\([^)]*\.(?:woff|ttf)\) format\([^)]*\)", "", (KATEX / "katex.min.css").read_text())
        style += ".katex-display{overflow:auto hidden}"  # a wide formula can be scrolled
        files.append(File.generated(config, "katex/katex.min.css", content=style))
        for path in sorted(KATEX.glob("fonts/*.woff2")):
            files.append(File.generated(config, f"katex/fonts/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """These folders lie beside `docs` in the repository, and in it on the site: one step up less."""
    markdown = re.sub(r"\]\(\.\./((?:\.\./)*benchmarks/)", r"](\1", markdown)
    return re.sub(r"\]\(\.\./((?:\.\./)*notebooks/\w+)\.ipynb", r"](\1.md", markdown)


def on_page_content(output, page, config, files):
    """
    Each picture is a link to itself, since it may be wider than the column, or than a phone. One that is a link already stays as it
    is, and so does one in several versions.
    """

    def link(match: re.Match) -> str:
        return f'<a class="picture" href="{match[2]}">{match[0]}</a>' if match[2] else match[0]

    whole = r'<(a|picture)\b.*?</\1>|<img\b[^>]*?\bsrc="([^"]+)"[^>]*>'
    return re.sub(whole, link, output, flags=re.DOTALL)


def check_code(output, page):
    for block in re.findall(r"<pre[^>]*>(.*?)</pre>", output, re.DOTALL):
        for line in html.unescape(re.sub(r"<[^>]*>", "", block)).splitlines():
            if len(line) > CODE_WIDTH:
                where = f"{page.file.src_uri}: a line of code of {len(line)} characters"
                raise PluginError(
                    f"{where} is wider than its box. Break it after at most {CODE_WIDTH}: {line.strip()}"
                )


def on_post_page(output, page, config):
    """
    Typesets the formulas of a page, and says where names may be broken. This comes after the search index, which has the TeX and
    whole names.
    """
    check_code(output, page)
    output = output.replace(' data-md-component="source"', "")  # the theme would fetch something
    output = re.sub(r"<td[^>]*>.*?</td>", lambda cell: NAME.sub(r"\1<wbr>", cell[0]), output, flags=re.DOTALL)
    formulas = [(html.unescape(tex), tag == "div") for tag, tex in FORMULA.findall(output)]
    if not formulas or "katex/katex.min.css" not in config.extra_css:
        return output
    try:
        done = subprocess.run(
            ["node", str(DOCS / "typeset.js")], input=json.dumps(formulas), capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise PluginError("Node.js is needed to typeset formulas, and there is no `node`. Install it.") from None
    if done.returncode:
        raise PluginError(f"{page.file.src_uri}: {done.stderr.strip()}")
    typeset = iter(json.loads(done.stdout))
    return FORMULA.sub(lambda match: f'<{match[1]} class="arithmatex">{next(typeset)}</{match[1]}>', output)
