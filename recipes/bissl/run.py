"""BiSSL from the command line: ``bissl --help``, in a checkout ``python recipes/bissl/run.py --help``."""

import sys
from pathlib import Path

if not __package__:
    # As a script: the repository's root instead of this folder, whose file names could hide installed modules.
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    __package__ = "bilevel.recipes.bissl"

from ..experiment.command.installed import recipes_installed

with recipes_installed("scipy", "torchvision"):
    from .commands.main import console

if __name__ == "__main__":
    console()
