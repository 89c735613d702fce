"""Runs of the recipe `cleaning` that take a second or two."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recipes.cleaning.command import main

SMALL = ["--threads=1", "--device=cpu", "--folds=2", "--model.image-size=8", "--model.features=pixels", "--shown=3"]


def shaded(root: Path, count: int = 12, seed: int = 0, classes: tuple[str, ...] = ("bright", "dark")) -> Path:
    """Class folders of pictures that a linear model tells apart by their brightness, all of them different."""
    draws = np.random.default_rng(seed)
    for place, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            level = 200 - 150 * place / max(1, len(classes) - 1)
            pixels = draws.normal(level, 25, (8, 8, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:03d}.png")
    return root


def clean(*arguments: str) -> int:
    """Exit code of a small run with these arguments."""
    try:
        return main([*SMALL, *arguments])
    except SystemExit as stop:
        return int(str(stop.code))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one message with which the command line is refused."""
    capsys.readouterr()
    code, output = clean(*arguments), capsys.readouterr()
    assert code == 2, output
    assert output.err.startswith("run.py: error: "), output.err
    assert output.err.count("error: ") == 1, output.err
    assert "Traceback" not in output.err + output.out
    return output.err


def in_a_child(work: Callable[[], object]) -> int:
    """The exit code of a child process that does `work`."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode
