"""The README as the package index and `pip show` have it: there, links into the repository must be absolute."""

import re
import tomllib
from pathlib import Path

from setuptools import setup


ROOT = Path(__file__).parent
RELATIVE = r"\((?!\w+:|#)([^)\s]+)\)"


def absolute(readme: str, repository: str) -> str:
    """The README with the address of the repository before relative links. A picture needs the address of the file itself."""
    pictures = re.sub(rf"!\[([^\]]*)\]{RELATIVE}", rf"![\1]({repository}/raw/main/\2)", readme)
    return re.sub(rf"\]{RELATIVE}", rf"]({repository}/blob/main/\1)", pictures)


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    setup(
        long_description=absolute((ROOT / "README.md").read_text(encoding="utf-8"), project["urls"]["Repository"]),
        long_description_content_type="text/markdown",
    )
