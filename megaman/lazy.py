"""Modules that are imported when they are first used, so that --help and a mistyped flag need not wait for
torch.
"""

import importlib
from types import ModuleType
from typing import Any


class Lazy(ModuleType):
    """Stands for a module until one of its names is asked for.

    Unlike importlib's LazyLoader it stays out of sys.modules, which torch would search.
    """

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(importlib.import_module(self.__name__), attribute)
        setattr(self, attribute, value)  # the next access costs nothing
        return value


def lazily(*rooms: str) -> list[Lazy]:
    """Our own rooms, by name."""
    return [Lazy(f"megaman.{room}") for room in rooms]
