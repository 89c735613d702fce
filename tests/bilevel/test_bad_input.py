"""What checkpoints refuse: one sentence that names the argument and what came."""

from pathlib import Path
from typing import Any

import pytest

from bilevel.checkpoint import save_checkpoint


@pytest.mark.parametrize("keep", [0, "x", 1.5, None, True])
def test_how_many_to_keep_is_a_count(keep: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^save_checkpoint: keep must be a whole number of at least 1, got {keep!r}$"):
        save_checkpoint(tmp_path, 1, {}, keep=keep)
    assert not list(tmp_path.iterdir())
