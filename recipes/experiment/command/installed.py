"""What a command says where a package is missing. Imports nothing that may be."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path


@contextmanager
def recipes_installed(*later: str) -> Iterator[None]:
    """Ends the process with exit code 2, and a message, where an import in the block finds no package.

    Args:
        later: packages that are imported once there is work for them; a run should not learn at its end that one is
            missing.
    """
    try:
        for missing in (name for name in later if find_spec(name) is None):
            raise ModuleNotFoundError(name=missing)
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "bilevel":
            raise
        print(
            f"{Path(sys.argv[0]).name}: error: {error.name} is not installed; what the recipes need comes with "
            'pip install "bilevel[recipes]", in a checkout with pip install -e ".[recipes]"',
            file=sys.stderr,
        )
        sys.exit(2)
