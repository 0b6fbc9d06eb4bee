"""Where a checkpoint is: in a directory, or on the hub. A mistyped path is answered at once; the hub's client would try for long."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError


HUB_ID = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*", re.ASCII)
PATIENCE = 5  # seconds for the first question to the hub


def check_there(path: str | Path, file: str | None = None, **source: Any) -> None:
    """
    Checks that there is something to be opened. Nothing is fetched. A directory goes before the hub, as everywhere.

    Args:
        path (`str` or `Path`): directory or hub id.
        file (`str`, *optional*): what it must hold. Asked of directories only.
        source (`dict`): as for `from_pretrained`, of which `token`, `cache_dir` and `local_files_only` matter here.

    Raises:
        FileNotFoundError: if there is no such directory, no such file in it, and nothing of this name on the hub or in its
            cache.
    """
    directory = Path(path)
    if directory.is_dir():
        if file is not None and not (directory / file).is_file():
            raise FileNotFoundError(f"The directory {path} holds no {file}; it holds {_content(directory)}.")
        return
    if directory.exists() or _is_cached(str(path), source.get("cache_dir")):
        return
    problem = _why_not_on_the_hub(str(path), source)
    if problem is not None:
        near = get_close_matches(directory.name, _names(directory.parent), 1)
        hint = f" Is {directory.parent / near[0]} meant?" if near else ""
        raise FileNotFoundError(f"There is no directory {path}{problem}.{hint}")


def _names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []


def _content(directory: Path) -> str:
    names = _names(directory)
    return ", ".join([*names[:8], *(["..."] if len(names) > 8 else [])]) or "nothing"


def _is_cached(name: str, cache_dir: str | None) -> bool:
    cache = Path(cache_dir or constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    return any(cache.glob("snapshots/*/*"))


def _why_not_on_the_hub(name: str, source: dict[str, Any]) -> str | None:
    """Why the hub has nothing of a name, as the end of a sentence. `None` if it may have something."""
    parent = Path(name).parts[0] if Path(name).parts else ""
    if not HUB_ID.fullmatch(name) or ("/" in name and Path(parent).is_dir()):
        return ""  # it is a path
    if constants.HF_HUB_OFFLINE or source.get("local_files_only"):
        return ", and nothing of this name in the hub's cache; the hub is not asked (HF_HUB_OFFLINE)"
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), token=source.get("token"), timeout=PATIENCE)
    except RepositoryNotFoundError as error:
        gated = isinstance(error, GatedRepoError)
        return None if gated else ", and no model of this name on the hub, or a private one (`hf auth login`)"
    except HfHubHTTPError:
        return None  # there is one, and its client says what is wrong with it
    except Exception as error:
        return f", nothing of this name in the hub's cache, and the hub cannot be reached ({type(error).__name__}: {error})"
    return None
