"""Small searches, and readers of what they leave."""

import json
from pathlib import Path
from typing import Any

from recipes.bissl.commands.search import main
from tests.support.recipes.small_runs import SMALL_OPTIONS


def search(*arguments: object) -> int:
    return main([*SMALL_OPTIONS, *map(str, arguments)])


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """Each trial's record without its time."""
    if not (folder / "study.json").exists():
        return {}
    import optuna

    name = json.loads((folder / "study.json").read_text())["study"]
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{folder / 'study.db'}")
    found, states = dict[str, dict[str, Any]](), optuna.trial.TrialState
    for trial in study.get_trials(states=(states.COMPLETE, states.PRUNED)):
        scores = {key: value for key, value in trial.user_attrs.get("scores", {}).items() if key != "seconds"}
        message = trial.user_attrs.get("message")
        number = f"{trial.user_attrs['id']:03d}"
        assert number not in found
        found[number] = {**trial.params, **scores, "message": message, "status": trial.user_attrs.get("status")}
    return dict(sorted(found.items()))


def selection(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "selection.json").read_text())
