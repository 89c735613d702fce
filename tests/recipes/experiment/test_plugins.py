"""Names given as `module:Class`."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from recipes.experiment.plugins import PluginError, resolve


def test_resolve_names_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    assert resolve("collections:Counter") is Counter
    assert resolve("os.path:join") is os.path.join
    (tmp_path / "plugin_needs_more.py").write_text("import a_module_that_is_not_there\n")
    (tmp_path / "plugin_that_fails.py").write_text("raise RuntimeError('broken inside')\n")
    (tmp_path / "plugin_that_leaves.py").write_text("import sys; sys.exit('no lights here')\n")
    for name, message in [
        ("collections", "not of the form"),
        (":Counter", "not of the form"),
        ("collections:", "not of the form"),
        ("../x:Y", "not of the form"),
        ("no_such_module_at_all:X", "no module 'no_such_module_at_all'"),
        ("no_such_package.part:X", "no module 'no_such_package'"),
        ("plugin_needs_more:X", "importing 'plugin_needs_more' failed.*a_module_that_is_not_there"),
        ("plugin_that_leaves:X", "importing 'plugin_that_leaves' failed: SystemExit: no lights here"),
        ("plugin_that_fails:X", "importing 'plugin_that_fails' failed: RuntimeError: broken inside"),
        ("collections:Nothing", "has no 'Nothing'; its classes: .*Counter"),
    ]:
        with pytest.raises(PluginError, match=message):
            resolve(name)
