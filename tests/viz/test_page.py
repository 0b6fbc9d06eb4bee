"""The page of a response: what it says, and what a browser makes of it."""

from __future__ import annotations

import math
import os
import re
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.chromium import CHROMIUM, measure
from tests.conftest import SPECS
from tests.viz.test_streamer import Bytes
from tests.viz.test_viewer import make_batch, steps_of
from trl_diffusion import DecodingConfig, tiny_policy_path
from trl_diffusion.policies.spec import DiffusionSpec
from trl_diffusion.trajectories.trajectory import NEVER, TrajectoryBatch, response_blocks
from trl_diffusion.viz import html
from trl_diffusion.viz.colours import contrast
from trl_diffusion.viz.html import SCHEMES, trajectory_html
from trl_diffusion.viz.stays import Stay
from trl_diffusion.viz.text import MASK


VOID = ("meta", "input", "br")
WRITES = "The sum of 17 and 25 is 42.\n\n\t= 答案是四十二 <b>&amp;</b> Größe 👩. "


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_policy_path())


class Node:
    """An element of a page."""

    def __init__(self, tag: str, attrs: dict, parent: Node | None = None):
        self.tag, self.attrs, self.parent, self.parts = tag, attrs, parent, []
        self.kinds = (attrs.get("class") or "").split()

    @property
    def text(self) -> str:
        return "".join(part if isinstance(part, str) else part.text for part in self.parts)

    def all(self, tag: str = "", **attrs) -> list[Node]:
        nodes = [node for part in self.parts if isinstance(part, Node) for node in (part, *part.all())]
        wanted = attrs.items()
        return [one for one in nodes if tag in ("", one.tag) and all(one.attrs.get(k) == v for k, v in wanted)]

    def one(self, tag: str = "", **attrs) -> Node:
        (found,) = self.all(tag, **attrs)
        return found


class Page(HTMLParser):
    """What a browser reads of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.root = self.at = Node("", {})
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.at is self.root, self.at.tag  # every element is closed
        self.tags = {node.tag for node in self.root.all()}
        names = {name for node in self.root.all() for name in node.attrs}
        assert not {"src", "href", "onclick", "onload", "onerror"} & names

    def handle_starttag(self, tag, attrs):
        node = Node(tag, dict(attrs), self.at)
        self.at.parts.append(node)
        self.at = self.at if tag in VOID else node

    def handle_endtag(self, tag):
        assert tag == self.at.tag
        self.at = self.at.parent

    def handle_data(self, data):
        self.at.parts.append(data)

    @cached_property
    def spans(self) -> list[Node]:
        """Tokens and masks of the text."""
        return self.root.one(id="text").all("span")

    def shown(self, step: int, spans: list[Node] | None = None) -> str:
        """The text after a step."""
        texts = []
        for span in self.spans if spans is None else spans:
            if int(span.attrs.get("data-a", 0)) <= step < float(span.attrs.get("data-b", math.inf)):
                texts.append(span.text)
        return "".join(texts)

    @cached_property
    def table(self) -> list[list[Node]]:
        return [row.all("th") + row.all("td") for row in self.root.one("tbody").all("tr")]

    @property
    def facts(self) -> dict[str, str]:
        return {name.text: fact.text for name, fact in zip(self.root.all("dt"), self.root.all("dd"), strict=True)}

    @property
    def after(self) -> dict[int, str]:
        """The texts that are spelt out."""
        return {
            int(node.attrs["data-after"]): node.text for node in self.root.all("div") if "data-after" in node.attrs
        }


def test_page_shows_what_happened(spec, tokenizer, tmp_path):
    batch = make_batch(spec)
    for row in (0, 3):
        page = Page(trajectory_html(batch, spec, tokenizer, tmp_path / "deep" / "one.html", row=row))
        steps = [step + 1 if step != NEVER else math.inf for step in steps_of(batch, spec, row)]
        last = max(step for step in steps if step < math.inf)
        tokens = [tokenizer.decode([token]) for token in batch.canvas_ids[row, : len(steps)].tolist()]
        probabilities = batch.logps[row].exp().tolist()
        counted = int(batch.completion_lengths[row])
        for now in range(last + 1):
            # A mask is as wide as its token, and breaks the line where it does.
            masks = [MASK * max(1, len(token) - token.count("\n")) + "\n" * token.count("\n") for token in tokens]
            wide = [
                token if step <= now else mask if step < math.inf else MASK
                for token, mask, step in zip(tokens, masks, steps, strict=True)
            ]
            assert page.shown(now) == "".join(wide)
        slider = page.root.one("input", id="slider").attrs
        assert (
            slider["max"] == slider["value"] == str(last) and page.root.one("output").text == f"step {last} of {last}"
        )
        written = [span for span in page.spans if "t" in span.kinds]
        places = [place for place, step in enumerate(steps) if step < math.inf]
        for span, place in zip(written, places, strict=True):
            assert f"p{round(probabilities[place] * 20)}" in span.kinds and ("g" in span.kinds) == (place >= counted)
            assert span.attrs["title"].endswith(f"step {steps[place]} with probability {probabilities[place]:.4f}")
        for place, cells in enumerate(page.table):
            position, token, bar, step, probability = cells
            assert position.text == str(place)
            if steps[place] == math.inf:
                assert (token.text, bar.all(), step.text, probability.text) == ("", [], "never", "")
                continue
            label = tokens[place].replace("\n", "↵")
            assert token.text == (label if label.strip() else "␣" * len(label)) and step.text == str(steps[place])
            assert probability.text == f"{probabilities[place]:.2f}"
            left, width = (float(value) for value in re.findall(r"[\d.]+", bar.one("i").attrs["style"]))
            assert left == pytest.approx(100 * (steps[place] - 1) / last, rel=1e-2, abs=0.01)
            assert left + width == pytest.approx(100, rel=1e-3)
        blocks = response_blocks(spec, batch.prompt_lengths[row : row + 1], len(steps))[0].tolist()
        edges = ["edge" in cells[0].parent.kinds for cells in page.table]
        assert edges == [place == 0 or blocks[place] != blocks[place - 1] for place in range(len(blocks))]
        assert list(page.after) == sorted({round(last * i / 5) for i in range(6)})
        for now, text in page.after.items():
            assert text == "".join(token if step <= now else MASK for token, step in zip(tokens, steps, strict=True))
        prompt = batch.prompt_ids[row][batch.prompt_mask[row] > 0].tolist()
        assert page.root.one(id="prompt").text.removeprefix("Prompt: ") == tokenizer.decode(prompt)
        assert page.facts["response"].startswith(f"{counted} tokens in {last} steps, mean probability ")
    assert os.listdir(tmp_path / "deep") == ["one.html"]


def test_page_shows_the_group(tokenizer, tmp_path):
    spec = SPECS["block-from-sequence"]
    batch = make_batch(spec, responses=3)
    rewards = {"solved": [1.0, 0.25, None, 1.0, 0.0, 0.0], "<b>": [0.5] * 6}
    config = DecodingConfig(20, 0.7, tokens_per_step=2)
    page = Page(
        trajectory_html(
            batch, spec, tokenizer, tmp_path / "one.html", row=1, rewards=rewards, policy="tiny <&>", decoding=config
        )
    )
    last = int(page.root.one(id="slider").attrs["max"])
    assert page.facts == {
        "reward solved": "0.25 (mean of 2 responses: 0.625)",
        "reward <b>": "0.5 (mean of 3 responses: 0.5)",
        "response": page.facts["response"],
        "policy": "tiny <&>",
        "decoding": "strategy confidence, temperature 0.7, max_new_tokens 20, tokens_per_step 2; other settings have "
        "their defaults",
    }
    cards = page.root.all("article")
    assert [card.one("h3").text for card in cards] == ["response 0", "response 2"]
    assert cards[0].one("p").text.startswith("solved 1, <b> 0.5, ")
    assert cards[1].one("p").text.startswith("solved does not apply, ")
    for row, card in zip((0, 2), cards, strict=True):
        ids = batch.canvas_ids[row, : int(batch.canvas_lengths[row])].tolist()
        assert page.shown(10**6, card.all("span")) == "".join(
            tokenizer.decode([token]) if step != NEVER else MASK
            for token, step in zip(ids, steps_of(batch, spec, row), strict=True)
        )
    alone = Page(
        trajectory_html(batch.select(slice(1, 2)), spec, tokenizer, tmp_path / "one.html", decoding={"order": "x"})
    )
    assert alone.root.all("article") == [] and alone.facts == {
        "response": page.facts["response"],
        "decoding": "order x",
    }
    assert int(alone.root.one(id="slider").attrs["max"]) == last
    many = batch.select(torch.tensor([0] * 20))
    page = Page(trajectory_html(many, spec, tokenizer, tmp_path / "one.html"))
    assert len(page.root.all("article")) == 15 and "4 more responses are not shown" in page.root.text
    with pytest.raises(ValueError, match=r"`rewards\['solved'\]` has 6 values for 1 responses"):
        trajectory_html(batch.select(slice(1, 2)), spec, tokenizer, tmp_path / "one.html", rewards=rewards)


def test_page_escapes_everything(tmp_path):
    spec = SPECS["block-from-sequence"]
    batch = make_batch(spec, (8,), 1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path())
    added = ["<script>alert(1)</script>", "</td>", "&amp;", "\"'>", "a\r\x00b", "two\nlines"]
    tokenizer.add_tokens(added)
    batch.canvas_ids[0, : len(added)] = torch.tensor(tokenizer.convert_tokens_to_ids(added))
    batch.completion_lengths[0] = int(batch.canvas_lengths[0])
    page = Page(trajectory_html(batch, spec, tokenizer, tmp_path / "one.html", title="<b>&\n</title>"))
    assert page.source.count("<script") == page.source.count("</script") == 1
    assert page.root.one("h1").text == page.root.one("title").text == "<b>&\n</title>"
    assert "\x00" not in page.source and "\r" not in page.source
    tokens = [cells[1].text for cells in page.table][: len(added)]
    assert tokens == [*added[:4], "a␍␀b", "two↵lines"]
    final = tokenizer.decode(batch.canvas_ids[0].tolist()).replace("\r", "␍").replace("\x00", "␀")
    assert page.after[max(page.after)] == page.shown(max(page.after)) == final
    assert page.shown(0).count("\n") == 1  # lines stay where they are
    assert not any(word in page.source for word in ("http:", "https:", "url(", "@import", "fetch("))


def test_page_at_chosen_steps_and_with_gaps(tokenizer, tmp_path):
    spec = SPECS["full"]
    batch = make_batch(spec, (3,), 1)
    steps = steps_of(batch, spec, 0)
    hole = steps.index(max(steps))
    batch.steps[0, hole] = NEVER
    batch.logps[0, 0] = float("nan")
    page = Page(trajectory_html(batch, spec, tokenizer, tmp_path / "one.html", steps=[3, 0, 1]))
    assert list(page.after) == [3, 0, 1] and page.after[0] == MASK * len(steps)
    first = next(span for span in page.spans if "t" in span.kinds)
    assert first.kinds == ["t", "p"] and "not recorded" in first.attrs["title"]
    assert page.table[hole][3].text == "never" and page.table[0][4].text == "?"
    before = page.source
    with pytest.raises(ValueError, match="holds 99, but this response took"):
        trajectory_html(batch, spec, tokenizer, tmp_path / "one.html", steps=[99])
    with pytest.raises(IndexError, match="no response 1: the batch has 1"):
        trajectory_html(batch, spec, tokenizer, tmp_path / "one.html", row=1)
    assert (tmp_path / "one.html").read_text() == before
    with pytest.raises(OSError):
        trajectory_html(batch, spec, tokenizer, tmp_path, title="a directory")
    batch.steps[:] = NEVER
    page = Page(trajectory_html(batch, spec, tokenizer, tmp_path / "one.html"))
    assert page.shown(0) == MASK * len(steps) and page.facts["response"].endswith("in 0 steps")


def test_page_of_a_response_that_was_revised(tokenizer, tmp_path, monkeypatch):
    """A token that was erased and one that was written over."""
    spec = SPECS["full"]
    batch = make_batch(spec, (3,), 1)
    ids = batch.canvas_ids[0].tolist()
    stays = [
        [Stay(6, 0.5, 1, 3), Stay(7, 0.25, 4)],
        [Stay(8, 0.5, 2, 3), Stay(9, 0.9, 3)],
        [Stay(10, 0.5, 2, 5)],
        *([Stay(token, 1.0, 5)] for token in ids[3:]),
    ]
    monkeypatch.setattr(html, "response_stays", lambda *_: stays)
    page = Page(trajectory_html(batch, spec, tokenizer, tmp_path / "one.html"))
    a, b, c, d, e = (tokenizer.decode([token]) for token in range(6, 11))
    begins = [MASK * 3, a + MASK * 2, a + c + e, MASK + d + e, b + d + e, b + d + MASK]
    assert [page.shown(step)[:3] for step in range(6)] == begins
    assert [page.after[step][:3] for step in range(6)] == begins
    hidden = [span.text for span in page.spans if "hidden" in span.attrs and "t" in span.kinds]
    assert hidden == [a, c, e] and "A dashed frame marks" in page.root.text
    assert page.table[0][1].text == f"{a} → {b}" and page.table[0][3].text == "1, 4"
    assert "erased in step 3" in page.table[0][2].all("i")[0].attrs["title"]


def long_page(folder: Path, length: int, responses: int = 4, step: int | None = None) -> str:
    """The page of a group with real text, at a step, with everything unfolded if a step is given."""
    spec = DiffusionSpec(mask_token_id=256, block_size=32, block_origin="response")
    ids = (WRITES.encode() * 8)[:length]
    prompt = b"user\nWhat is 17 + 25? Answer in English, in German and in Chinese.\nassistant\n"
    generator = torch.Generator().manual_seed(0)
    order = torch.stack(
        [torch.cat([torch.randperm(32, generator=generator) for _ in range(8)]) for _ in range(responses)]
    )
    batch = TrajectoryBatch(
        torch.tensor([list(prompt)] * responses),
        torch.ones(responses, len(prompt), dtype=torch.long),
        torch.tensor([list(ids)] * responses),
        order[:, :length],
        torch.rand(responses, length, generator=generator).log(),
        torch.full((responses,), length),
        torch.full((responses,), length - 9),
    )
    path = trajectory_html(
        batch, spec, Bytes(), folder / "page.html", title="row 0, response 0", policy="policy" * 20,
        rewards={"correct": [1.0] * responses}, decoding=DecodingConfig(length, 1.0, strategy="threshold"),
    )  # fmt: skip
    source = path.read_text(encoding="utf-8")
    if step is not None:
        unfold = "document.querySelectorAll('details').forEach(one => one.open = true)"
        source = source.replace("</body>", f"<script>go({step}); {unfold}</script></body>")
    return source


def test_page_is_small(tmp_path):
    assert len(long_page(tmp_path, 256, responses=1)) < 150_000
    assert len(long_page(tmp_path, 256, responses=8)) < 400_000


def test_table_shows_blanks_and_parts_of_characters(tmp_path):
    long_page(tmp_path, 48)
    labels = [cells[1].text for cells in Page(tmp_path / "page.html").table]
    assert labels[:4] == ["T", "h", "e", "␣"] and labels[27:30] == ["↵", "↵", "⇥"]
    assert labels[32:38] == ["…", "…", "答", "…", "…", "案"]


def test_text_can_be_read_on_every_colour_of_the_page(tmp_path):
    """A browser measures what is on a page; here, what could be."""
    source = long_page(tmp_path, 17)
    light, _, dark = source.partition("@media screen and (prefers-color-scheme: dark)")
    for part, colours in zip((light, dark), SCHEMES.values(), strict=True):
        rules = re.findall(r"--new:(\S+); --new-ink:(\S+); --kept:(\S+); --kept-ink:(\S+); --after:(\S+);", part)
        assert len(rules) == 22
        for *pairs, after in rules:
            new, new_ink, kept, kept_ink, after = (
                tuple(bytes.fromhex(one.removeprefix("#"))) for one in (*pairs, after)
            )
            assert min(contrast(new, new_ink), contrast(kept, kept_ink), contrast(after, colours["faint"])) > 4.5
        for behind in ("page", "panel", "mask"):
            assert min(contrast(colours[text], colours[behind]) for text in ("ink", "faint")) > 4.5


def browse(folder: Path, pages: dict[str, str], script: str, dark: bool = False) -> dict[tuple[str, int], dict]:
    """What a script finds on pages, at the width of a screen and of a phone."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium (Debian's package `chromium`)")
    jobs = [(f"{name}.html", width) for name in pages for width in (1440, 390)]
    for name, source in pages.items():
        (folder / f"{name}.html").write_text(source, encoding="utf-8")
    found = dict(zip(jobs, measure(folder, jobs, folder / "profile", script, dark), strict=True))
    assert not {job: one for job, one in found.items() if "error" in one}
    return found


LOOK = """
function measure(view) {
  const boxes = [...view.document.body.querySelectorAll("*")].filter(one => one.checkVisibility() && one.clientWidth);
  const beyond = boxes.filter(one => one.scrollWidth > one.clientWidth + 1 && view.getComputedStyle(one).display !== "inline");
  return {wide: [...wide(view), ...beyond.map(name)], faint: faint(view), texts: texts(view).length,
    background: view.getComputedStyle(view.document.body).backgroundColor};
}
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page_in_a_browser(dark, tmp_path):
    """Nothing overflows and everything can be read, at the width of a screen and of a phone."""
    pages = {
        f"{length}-{step}": long_page(tmp_path, length, step=step)
        for length, step in ((17, None), (17, 9), (256, None), (256, 100))
    }
    background = "rgb(22, 24, 29)" if dark else "rgb(255, 255, 255)"
    for where, found in browse(tmp_path, pages, LOOK, dark).items():
        texts = found.pop("texts")
        assert texts > 50 and found == {"wide": [], "faint": {}, "background": background}, where


PLAY = """
function measure(view) {
  const page = view.document, slider = page.getElementById("slider"), play = page.getElementById("play");
  const shown = box => [...box.querySelectorAll("span:not([hidden])")].map(one => one.textContent).join("");
  const press = key => page.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
  const seen = {states: []};
  for (const step of [0, 1, 2, 31, 32, 33, 100, 255, 256]) {
    slider.value = step;
    slider.dispatchEvent(new Event("input"));
    const text = page.getElementById("text"), news = text.querySelectorAll(".u:not([hidden])");
    seen.states.push([step, page.getElementById("at").textContent, shown(text), shown(page.querySelector("article")), news.length]);
  }
  seen.keys = ["Home", "ArrowRight", "ArrowRight", "ArrowLeft", "End", "x"].map(key => { press(key); return slider.value; });
  press(" ");
  seen.play = [slider.value, play.getAttribute("aria-label")];
  press(" ");
  page.getElementById("next").click();
  seen.play.push(slider.value, play.getAttribute("aria-label"));
  view.scrollTo(0, page.documentElement.scrollHeight);
  const [box, text] = ["player", "text"].map(id => page.getElementById(id).getBoundingClientRect());
  return {...seen, player: [view.scrollY, box.top, text.bottom, box.bottom, view.innerHeight]};
}
"""


def test_page_can_be_played(tmp_path):
    """The slider, the keys and the button move all texts; the text and the slider stay in sight."""
    source = long_page(tmp_path, 256)
    page = Page(tmp_path / "page.html")
    card = page.root.all("article")[0].all("span")
    for found in browse(tmp_path, {"page": source}, PLAY).values():
        for step, at, text, other, news in found["states"]:
            assert (at, text, other) == (f"step {step} of 256", page.shown(step), page.shown(step, card))
            assert news == int(step > 0)
        assert found["keys"] == ["0", "1", "2", "1", "256", "256"]
        assert found["play"] == ["0", "pause", "1", "play"]
        scrolled, top, text, bottom, height = found["player"]
        assert scrolled > 100 and top == 0 and text < bottom < 0.6 * height
