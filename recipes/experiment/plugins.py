"""Import of what a name of the form `module:Class` stands for."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


class PluginError(ValueError):
    """A `module:Class` name that does not lead to anything; the message says which half is wrong."""


def resolve(name: str) -> Any:
    """The attribute that `name`, as `module:Class` or `package.module:Class`, stands for.

    A module in the current directory is found as well as an installed one. Raises PluginError if `name` has another
    form, if the module is missing or fails while it is imported, or if it has no such attribute.
    """
    module_name, separator, attribute = name.partition(":")
    if not separator or not attribute.isidentifier() or not all(p.isidentifier() for p in module_name.split(".")):
        raise PluginError(f"{name!r} is not of the form 'module:Class', such as 'my_package.my_module:MyClass'")
    # A script's own folder is on the path, the current one is not. Last in line, it hides nothing installed.
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise PluginError(
                f"{name!r}: there is no module {error.name!r}, neither installed nor in the current directory "
                f"{os.getcwd()!r}"
            ) from error
        raise PluginError(f"{name!r}: importing {module_name!r} failed: {type(error).__name__}: {error}") from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        classes = sorted(key for key, value in vars(module).items() if isinstance(value, type) and key[0] != "_")
        raise PluginError(
            f"{name!r}: module {module_name!r} has no {attribute!r}; its classes: {', '.join(classes) or 'none'}"
        ) from error
