"""Cleaning from the command line: ``cleaning --help``, in a checkout ``python recipes/cleaning/run.py --help``."""

import sys
from importlib.util import find_spec
from pathlib import Path

LATER = ("scipy", "torchvision")
"""What is imported once there is work for it; a run should not learn at its end that it is missing."""

if not __package__:
    # As a script: the repository's root instead of this folder, whose file names could hide installed modules.
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    __package__ = "bilevel.recipes.cleaning"

try:
    for missing in (name for name in LATER if find_spec(name) is None):
        raise ModuleNotFoundError(name=missing)
    from .command import console
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] == "bilevel":
        raise
    print(
        f"{Path(sys.argv[0]).name}: error: {error.name} is not installed; what the recipes need comes with "
        'pip install "bilevel[recipes]", in a checkout with pip install -e ".[recipes]"',
        file=sys.stderr,
    )
    sys.exit(2)

if __name__ == "__main__":
    console()
