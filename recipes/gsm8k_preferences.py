"""
Writes preference pairs in TRL's format from GSM8K: its solution is chosen, the same with a wrong result is rejected.

    python recipes/gsm8k_preferences.py data/gsm8k/train.jsonl pairs.jsonl
    python recipes/gsm8k_preferences.py data/gsm8k/train.jsonl pairs.jsonl --plain --implicit_prompt --size 500

By default a row has messages and a `prompt` of its own; `--plain` makes them text, `--implicit_prompt` puts the prompt at
the beginning of `chosen` and `rejected` (https://huggingface.co/docs/trl/dataset_formats#preference).
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

from trl_diffusion.tasks.gsm8k import gsm8k_rows
from trl_diffusion.utils import check_writable, errors_in_a_line, write_text


def corrupt(solution: str, rng: random.Random) -> str:
    """The solution with another result: in the line `#### result`, and wherever that number stands as the last one."""
    text, result = solution.rsplit("#### ", 1)
    right = int(result.replace(",", "").strip())
    wrong = right + rng.choice([-1, 1]) * rng.randint(1, max(2, abs(right) // 2))
    number = re.compile(rf"(?<![\d.,]){re.escape(result.strip())}(?![\d]|[.,]\d)")
    places = list(number.finditer(text))
    if places:
        last = places[-1]
        text = text[: last.start()] + str(wrong) + text[last.end() :]
    return f"{text}#### {wrong}"


def make_pair(prompt: str, solution: str, rng: random.Random, plain: bool, implicit_prompt: bool) -> dict[str, Any]:
    """A row of a preference dataset."""
    solution = re.sub(r"<<.*?>>", "", solution)  # the data's own calculator annotations
    pair = {"chosen": solution, "rejected": corrupt(solution, rng)}
    if plain:
        prompt += "\n"
        return {name: prompt + text for name, text in pair.items()} if implicit_prompt else {"prompt": prompt, **pair}
    asked = [{"role": "user", "content": prompt}]
    answers = {name: [{"role": "assistant", "content": text}] for name, text in pair.items()}
    return {name: asked + turn for name, turn in answers.items()} if implicit_prompt else {"prompt": asked, **answers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="GSM8K as JSON Lines with `question` and `answer`")
    parser.add_argument("output", type=Path, help="file to write, .jsonl")
    parser.add_argument("--plain", action="store_true", help="text instead of messages")
    parser.add_argument("--implicit_prompt", action="store_true", help="no `prompt` of its own")
    parser.add_argument("--size", type=int, help="most pairs (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="which wrong results (default: 0)")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with errors_in_a_line():
        check_writable(args.output.parent, "output")
        rows = gsm8k_rows(args.source)[: args.size]
        for number, row in enumerate(rows):
            if re.search(r"#### *-?[\d,]+\s*$", row["answer"]) is None:
                end = row["answer"][-40:]
                raise ValueError(
                    f"{args.source}, row {number}: the answer must end in '#### ' and a whole number, got {end!r}."
                )
        pairs = [make_pair(row["prompt"], row["answer"], rng, args.plain, args.implicit_prompt) for row in rows]
        write_text(args.output, "".join(json.dumps(pair) + "\n" for pair in pairs))
    print(f"{len(pairs)} pairs are in {args.output}.")


if __name__ == "__main__":
    main()
