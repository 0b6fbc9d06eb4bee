"""
Makes transformers' auto classes know the families, without importing transformers: `import trl_diffusion` stays quick, and
the families are registered as soon as the auto classes are there, whoever imports them.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


AUTO_CLASSES = "transformers.models.auto.configuration_auto"
PACKAGES = ("transformers", __name__.partition(".")[0])


def register_families() -> None:
    """Registers the families with transformers' auto classes: now if those are imported, or else once they are."""
    if _auto_classes_are_there():
        import_module(".families", __package__)  # which registers them
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _auto_classes_are_there() -> bool:
    module = sys.modules.get(AUTO_CLASSES)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


class _Finder(MetaPathFinder):
    """
    Has the modules of transformers, and of this package, found by the other finders. When the outermost of their imports
    ends, and the auto classes are among what it brought, the families are registered: before, modules that they need may
    be half imported.
    """

    def __init__(self) -> None:
        self.imports = threading.local()  # `depth`: how many of these modules this thread is importing
        self.done = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self.done or fullname.partition(".")[0] not in PACKAGES:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader, self)
        return spec

    def finish(self, name: str) -> None:
        """Registers the families if they can be, now that the code of module `name` has run."""
        if self.done or not (name == AUTO_CLASSES or _auto_classes_are_there()):
            return
        self.done = True
        try:
            import_module(".families", __package__)
        except BaseException:
            self.done = False  # and is tried again after the next import
            raise
        with suppress(ValueError):
            sys.meta_path.remove(self)


class _Loader(Loader):
    """Another loader, which gets its place in the module back before it runs, and the registration behind it."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self.loader, self.finder = loader, finder

    def __getattr__(self, name: str) -> Any:  # all else that it can, such as the code for `python -m`
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        imports = self.finder.imports
        imports.depth = getattr(imports, "depth", 0) + 1
        try:
            self.loader.exec_module(module)
        finally:
            imports.depth -= 1
        if imports.depth == 0:
            self.finder.finish(module.__name__)
