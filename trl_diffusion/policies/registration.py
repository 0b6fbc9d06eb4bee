"""
Makes transformers' auto classes know the families, without importing transformers: `import trl_diffusion` stays quick, and
the families are registered as soon as the auto classes are there, whoever imports them.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType


AUTO_CLASSES = "transformers.models.auto.configuration_auto"
PACKAGES = ("transformers", __name__.partition(".")[0])


def register_families() -> None:
    """Registers the families with transformers' auto classes: now if those are imported, or else once they are."""
    if AUTO_CLASSES in sys.modules:
        import_module(".families", __package__)  # which registers them
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """
    Finds the modules of transformers, and of this package, as Python does. When the outermost of their imports ends, and
    the auto classes are among what it brought, the families are registered: before, modules that they need may be half
    imported.
    """

    def __init__(self) -> None:
        self.imports = threading.local()  # `depth`: how many of these modules this thread is importing

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in PACKAGES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path, self)
        return spec

    def finish(self) -> None:
        if AUTO_CLASSES in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            register_families()


class _Loader(SourceFileLoader):
    def __init__(self, fullname: str, path: str, finder: _Finder) -> None:
        super().__init__(fullname, path)
        self.finder = finder

    def exec_module(self, module: ModuleType) -> None:
        imports = self.finder.imports
        imports.depth = getattr(imports, "depth", 0) + 1
        try:
            super().exec_module(module)
        finally:
            imports.depth -= 1
        if imports.depth == 0:
            self.finder.finish()
