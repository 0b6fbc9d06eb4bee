"""Grade-school and competition mathematics, checked by math-verify (`pip install 'trl-diffusion[eval]'`)."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

from .completions import texts
from .math_checker import MathChecker


# No pattern here backtracks: what one part takes, it keeps (`*+`), or the next part could not have taken.
_MARKER = re.compile(r"(?<!#)####(?!#)")
_HEADING = re.compile(r"(?<!#)####(?!#)[^\n]*+")
_ANSWER_IS = re.compile(r"(?:the )?(?:final )?answer(?: is)?", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)[ \t]*+\{|\\.|[{}]", re.DOTALL)
_LATEX = re.compile(r"\\[A-Za-z]++(?:[ \t]*+\{[^{}]*+\})?+")
_WORD = re.compile(r"[^\W\d_]{2}")
_NUMBER = re.compile(r"\d++(?:[.,]\d++)*+")
_THOUSANDS = re.compile(r"[-+]?+\d{1,3}(?:,\d{3})++(?:\.\d*+)?+")
_DECIMAL = re.compile(r"[-+]?+(?:\d++(?:\.\d*+)?+|\.\d++)", re.ASCII)
_SCALED = re.compile(
    r"(\d++(?:,\d{3})*+(?:\.\d++)?+)\s*+(?:\\\s)?+(\\(?:text|mathrm|textbf)\{\s*+)?+(thousand|million|billion|trillion)\b",
    re.ASCII | re.IGNORECASE,
)
_EXPONENT = re.compile(r"(?<![\w.])(\d++(?:\.\d++)?+)[eE]([-+]?+\d{1,2})\b", re.ASCII)
_COMMAND = r"\\(?:text|textbf|textrm|mathrm|mathbf)\s*+\{\s*+"
_VALUE = r"\s*+\}(?:[\s~.:]|\\[ ,;:!~]|\\q?+quad\b)*+(\S.*+)"
_LETTER = re.compile(rf"\(?+([A-J])\)?+|{_COMMAND}\(?+([A-J])\)?+\s*+\}}")
_CHOICE = re.compile(rf"{_COMMAND}\(?+([A-J])\)?+{_VALUE}", re.DOTALL)
_GOLD_CHOICE = re.compile(rf"{_COMMAND}\(([A-J])\){_VALUE}", re.DOTALL)  # `\mathbf{A} + I` is no choice
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}  # zeros

MAX_ANSWER = 1000  # characters of a marked answer: a longer one is wrong
MAX_SEARCHED = 4000  # characters at the end of a text in which an answer is searched

checker = MathChecker()


def _last_box(text: str) -> tuple[int, str] | None:
    """Where the last `\\boxed{...}` of `text` ends, and what is in it, without boxes in it."""
    opened: list[int | None] = []  # of each brace that is open, where the content of its box begins
    found = None
    for match in _BOX.finditer(text):
        token = match[0]
        if token == "}":
            begin = opened.pop() if opened else None
            if begin is not None:
                found = begin, match.end()
        elif token[-1] == "{" and token != "\\{":
            opened.append(match.end() if token != "{" else None)
    if found is None:
        return None
    return found[1], text[found[0] : found[1] - 1].replace("\\boxed", "").replace("\\fbox", "")


def _has_words(text: str) -> bool:
    """Whether there are words in `text`: two letters in a row, not of a command of LaTeX or its argument."""
    return _WORD.search(_LATEX.sub(" ", text)) is not None


def _after_marker(line: str) -> str:
    """What comes after the last `####` of a line; empty if there is none."""
    end = 0
    for match in _MARKER.finditer(line):
        end = match.end()
    return line[end:].strip() if end else ""


def _is_answer(line: str) -> bool:
    """Whether a line with words is an answer, `72 dollars` or `Answer: 72`, and no heading, `Step 3`: one number, first."""
    numbers = [match.start() for match in _NUMBER.finditer(line)]
    return len(numbers) == 1 and not _has_words(_ANSWER_IS.sub("", line[: numbers[0]]))


def final_answer(text: str) -> str | None:
    """
    The answer that a text marks as its own; empty if its last line is marked and is no answer; `None` if it marks none.

    Marks are `\\boxed{answer}` and, the way GSM8K does it, `#### answer` up to the end of the line. The last mark counts. A
    `####` with words after it is a heading, unless it is the last line, reads like `72 dollars`, and there is no box.
    """
    box = _last_box(text)
    marker, begin = None, 0
    last = text.rstrip().count("\n")
    for number, line in enumerate(text.split("\n")):
        marked = _after_marker(line)
        if marked and not _has_words(marked):
            marker = begin + line.rindex("####"), marked
        elif marked and box is None and number == last:
            marker = begin, marked if _is_answer(marked) else ""
        begin += len(line) + 1
    marks = [mark for mark in (box, marker) if mark is not None]
    return max(marks)[1].strip() if marks else None


def _plain(text: str) -> str:
    """`text` without what is around a number: emphasis, a full stop, a currency, separators of thousands."""
    text = text.strip().removesuffix(".").strip("*").strip().removesuffix(".")
    if text.count("$") == 1 and not text.endswith("$"):
        text = text.replace("\\$", "").replace("$", "")
    elif len(text) > 2 and text[0] == text[-1] == "$" and _THOUSANDS.fullmatch(text[1:-1]):
        text = text[1:-1]
    return text.replace(",", "") if _THOUSANDS.fullmatch(text) else text


def _number(text: str) -> Fraction | None:
    """The number that a plain decimal number stands for, or `None`."""
    text = _plain(text).removeprefix("$").removesuffix("$")
    return Fraction(text) if len(text) <= MAX_ANSWER and _DECIMAL.fullmatch(text) else None


def _scaled(text: str) -> str:
    """`text` with `5 million` and `5e6` written as `5000000`: math-verify takes the word for a unit, and the `e` for Euler's number."""

    def written_out(match: re.Match[str]) -> str:
        number = Decimal(match[1].replace(",", "")).scaleb(_SCALES[match[3].lower()])
        return f"{number:f}{match[2] or ''}"

    text = _SCALED.sub(written_out, text)
    return _EXPONENT.sub(lambda match: f"{Decimal(match[1]).scaleb(int(match[2])):f}", text)


def _chosen(gold: str, given: str | None) -> tuple[str, str | None] | bool | None:
    """
    What is left to compare if the gold answer is a letter with a value, `\\textbf{(E)}\\ 5`: the two values, or whether the letters are
    the same if the answer is a letter alone. An answer with another letter is wrong. `None` for another gold answer.
    """
    choice = _GOLD_CHOICE.fullmatch(gold.strip(" \n$"))
    if choice is None:
        return None
    letter, value = choice.groups()
    if given is None:
        return value, given
    if alone := _LETTER.fullmatch(given.strip(" \n$.")):
        return letter in alone.groups()
    own = _CHOICE.fullmatch(given.strip(" \n$"))
    if own is None:
        return value, given
    return own[1] == letter and (value, own[2])


def _to_read(answer: str) -> str:
    """A marked answer as math-verify takes it: `$...$` for what is LaTeX, text to search a number in otherwise."""
    answer = _plain(answer)
    if _has_words(answer) or any(sign in answer for sign in ("$", "\\(", "\\[")):
        return answer
    return f"${answer}$"


def _marked(text: str, answer: str) -> str | None:
    """The `answer` that `text` marks, as math-verify takes it, or `None` for what cannot be right."""
    box = _last_box(text)
    if not answer or len(answer) > MAX_ANSWER:
        return None
    return f"\\boxed{{{_plain(answer)}}}" if box is not None and answer == box[1].strip() else _to_read(answer)


def math_accuracy(completions, answer, **kwargs) -> list[float | None]:
    """
    Reward function: 1 if the final answer equals the gold one, 0 if not, `None` if the gold answer is `None`
    or cannot be read.

    Needs an `answer` column: just the answer, a GSM8K solution that ends in `#### answer`, or a solution with a
    `\\boxed{answer}`. Of a completion, what `final_answer` finds is the answer; in one that marks none, math-verify looks
    for it. Decimal numbers are compared exactly. If the gold answer is a letter with a value (`\\textbf{(E)}\\ 5`), either is right, and
    both if they belong together. Everything else is compared by math-verify in processes of their own, with
    the limits of `MathLimits`; an answer that takes more is wrong. May be called in any thread.

    Raises:
        ImportError: if math-verify is not installed.
        RuntimeError: if no process can be started.
    """
    rewards: list[float | None] = [None] * len(answer)
    pairs: dict[int, tuple[str, str]] = {}
    for row, (text, gold) in enumerate(zip(texts(completions), answer, strict=True)):
        if gold is None:
            continue
        expected, given = final_answer(gold), final_answer(text)
        chosen = _chosen(gold if expected is None else expected, given)
        if isinstance(chosen, bool):
            rewards[row] = float(chosen)
            continue
        if chosen is not None:
            (gold, given), expected = chosen, None
        gold_form = _to_read(gold) if expected is None else _marked(gold, expected)
        if gold_form is None or not any(map(str.isalnum, gold_form)):
            continue
        rewards[row] = 0.0
        form = _HEADING.sub("", text)[-MAX_SEARCHED:] if given is None else _marked(text, given)
        marked = gold if expected is None else expected
        gold_form, marked = _scaled(gold_form), _scaled(marked)
        given, form = given and _scaled(given), form and _scaled(form)
        number, other = _number(marked), _number(given or "")
        if number is not None and other is not None:
            rewards[row] = float(number == other)
        elif form is not None:
            pairs[row] = gold_form, form
    for row, right in zip(pairs, checker.compare(list(pairs.values())), strict=True):
        rewards[row] = None if right is None else float(right)
    return rewards


def answer_format(completions, **kwargs) -> list[float]:
    """
    Reward function: 1 for a completion that ends in `#### answer` with text before it, as GSM8K's solutions do; 0.2 for
    one that holds a number at least, so that a policy far from the format has a slope to climb; 0 otherwise.

    The answer is a word without white space, and both it and the text before hold a letter or a digit.
    """
    return [1.0 if _has_format(text) else 0.2 * any(map(str.isdecimal, text)) for text in texts(completions)]


def _has_format(text: str) -> bool:
    *_, last = [None, *_MARKER.finditer(text)]
    if last is None:
        return False
    answer = text[last.end() :].split(maxsplit=1)
    parts = [text[: last.start()], *answer]
    return len(answer) == 1 and all(any(map(str.isalnum, part)) for part in parts)
