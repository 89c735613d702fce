"""What all tests share."""

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def called_as_the_script() -> Iterator[None]:
    """Messages begin with the name of the command that runs; for tests that call it inside this process, ``run.py``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["recipes/bissl/run.py"])
        yield
