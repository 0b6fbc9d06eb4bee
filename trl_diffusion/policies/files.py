"""Whether the files of a checkpoint are whole, before any of them is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from ..utils import read_record


LFS_POINTER = b"version https://git-lfs.github.com/spec"
# The files of transformers and peft that hold an object.
RECORDS = (
    "config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json",
    "adapter_config.json",
)  # fmt: skip
INDEX = "model.safetensors.index.json"
MODELS = ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
COLLECTION = "collection.json"  # the plan of stored trajectories, as `collect` writes it
_AGAIN = "Fetch it again."


def check_records(path: str | Path) -> None:
    """
    Checks the JSON files of a checkpoint in a directory. One on the hub has been checked by its client.

    Args:
        path (`str` or `Path`): directory, or hub id.

    Raises:
        ValueError: naming the file, if it is a pointer of Git LFS, or no JSON object.
    """
    for name in RECORDS:
        file = Path(path, name)
        if file.is_file():
            _check_content(file)
            read_record(file, advice=_AGAIN)


def check_weights(path: str | Path) -> None:
    """
    Checks the files of the weights in the directory of a checkpoint or an adapter. Headers are read, and no weights.

    Args:
        path (`str` or `Path`): directory, or hub id.

    Raises:
        ValueError: naming the file, if it is a pointer of Git LFS, empty, cut off or damaged, or if a part of the weights
            is missing.
    """
    directory = Path(path)
    names = [name for name in (*MODELS, *ADAPTERS) if not name.endswith(".json")]
    index = directory / INDEX
    if index.is_file():
        _check_content(index)
        parts = read_record(index, ("weight_map",), _AGAIN)["weight_map"]
        if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
            raise ValueError(f"{index}: `weight_map` must name a file for each weight. {_AGAIN}")
        missing = sorted({part for part in parts.values() if not (directory / part).is_file()})
        if missing:
            raise ValueError(f"{index} names {missing}, which {directory} does not have. Fetch them.")
        names = sorted(set(parts.values()))
    for name in names:
        file = directory / name
        if file.is_file():
            _check_content(file)
            if file.suffix == ".safetensors":
                _check_safetensors(file)


def check_one_policy(directory: str | Path, adapter: bool) -> None:
    """
    Checks that a policy can be saved in a directory. An adapter and a whole model side by side would be opened as one policy,
    which nobody has trained. The card of a policy would replace the card of a collection.

    Args:
        directory (`str` or `Path`): the directory, which may not exist.
        adapter (`bool`): whether an adapter will be saved, and not a whole model.

    Raises:
        ValueError: if the directory holds the other kind of policy, or a collection.
    """
    found, advice = policy_in(directory), "Choose another directory (`output_dir`), or remove what is there."
    if (name := found.get("a whole model" if adapter else "an adapter")) is not None:
        kinds = ("a whole model", "an adapter")
        raise ValueError(
            f"{directory} holds {kinds[not adapter]} ({name}), and this run would save {kinds[adapter]} beside it. {advice}"
        )
    if Path(directory, COLLECTION).exists():
        raise ValueError(f"{directory} holds a collection of trajectories ({COLLECTION}), and no policy. {advice}")


def policy_in(directory: str | Path) -> dict[str, str]:
    """The kinds of policy that a directory holds, `"a whole model"` and `"an adapter"`, each with the name of a file."""
    whole = [*MODELS, *(path.name for path in sorted(Path(directory).glob("model-*-of-*.safetensors")))]
    kinds = {"a whole model": whole, "an adapter": ADAPTERS}
    found = {kind: [name for name in names if Path(directory, name).exists()] for kind, names in kinds.items()}
    return {kind: names[0] for kind, names in found.items() if names}


def check_no_pointer(file: str | Path) -> None:
    """Raises a `ValueError` that names the file if it is a pointer of Git LFS, which stands for the file."""
    with Path(file).open("rb") as content:
        if content.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{file} is a pointer of Git LFS, not the file itself. Fetch it with `git lfs pull`.")


def _check_content(file: Path) -> None:
    check_no_pointer(file)
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty. {_AGAIN}")


def _check_safetensors(file: Path) -> None:
    """Compares the size of a file with what its header says."""
    size = file.stat().st_size
    try:
        with file.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            if not 0 < length <= size - 8:
                raise ValueError("it has no header, or is cut off inside")
            header = json.loads(content.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        wanted = 8 + length + max(ends, default=0)
    except (OSError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} holds no weights in the format of safetensors ({error}). {_AGAIN}") from error
    if size != wanted:
        raise ValueError(f"{file} has {size} bytes, and its header says {wanted}: it is cut off or damaged. {_AGAIN}")
