"""Where the repository and the optional photographs are."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PHOTOGRAPHS = Path(os.environ.get("BILEVEL_CIFAR_ZIP", ROOT.parent / "shared" / "data" / "cifar10_images.zip"))
"""A zip of CIFAR-10 as JPEG or PNG files, ``cifar10/train/CLASS/NNNN.jpg``; tests that need it skip without."""
