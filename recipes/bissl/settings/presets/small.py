"""The paper's sets at a fraction of its cost: global CG, one solve an alternation, both arms at equal pretext steps."""

from typing import Any

from ....vision.sources.published.catalog import DATASETS
from ..config import ComputeConfig, Config
from ..paper import TITLES, PaperVersion
from .published import Preset, paper_preset, reported
from .solves import ONE_SOLVE

FINETUNE_IMAGES = 600_000
"""Labelled images that one fine-tuning sees, about; the epochs follow from it."""


def stl10(paper_version: PaperVersion = "v2") -> Config:
    """STL-10 at 96x96 px with ResNet-18, at a tenth of the paper's length and global CG; both arms at equal steps.

    Command: ``python recipes/bissl/run.py --preset stl10``; a day on one ordinary GPU is a guess, not a measurement.
    """
    changes = {
        "pretext": {
            "epochs": 50,
            "batch_size": 512,
            "warmup_epochs": 5.0,
            "baseline_epochs": None,
            "baseline_lr": None,
        },
        "bissl": {
            "alternations": 50,
            "adaptation_every": 10,
            "layerwise": False,
            "through_negative_curvature": False,
            **ONE_SOLVE,
            "lower_warmup_epochs": 1.0,
        },
        "finetune": {"epochs": 100},
    }
    return _changed(paper_preset("stl10")(paper_version), "stl10", changes)


def small_preset(name: str) -> Preset:
    """A preset for one ordinary GPU, on the downstream set `name` of the paper."""
    epochs = min(100, max(10, round(FINETUNE_IMAGES / DATASETS[name].split[0])))

    def preset(paper_version: PaperVersion = "v2") -> Config:
        changes = {
            "pretext": {
                "epochs": 20,
                "batch_size": 256,
                "warmup_epochs": 2.0,
                "lr": 1.0,
                "baseline_epochs": None,
                "baseline_lr": None,
                "monitor_every": 5,
                "checkpoint_every": 5,
            },
            # 2,000 lower steps: five epochs beside twenty, the share that the paper gives them.
            "bissl": {
                "alternations": 100,
                "adaptation_every": 20,
                "layerwise": False,
                "through_negative_curvature": False,
                **ONE_SOLVE,
                "hessian_batches": 2,
                "lower_lr": 1.0,
                "lower_warmup_epochs": 0.5,
                "hvp": "reverse-kept",
                "graph_memory": 4.0,
            },
            "finetune": {"epochs": epochs, "validate_every": 2},
        }
        compute = ComputeConfig(precision="bf16", tf32=True, channels_last=True)
        paper = paper_preset(name)(paper_version).model_copy(update={"seeds": 3, "compute": compute})
        return _changed(paper, f"small-{name}", changes)

    preset.__doc__ = f"""{TITLES[name]} at 96 px on one ordinary GPU: 25 pretext epochs an arm, three seeds.

    Command: ``python recipes/bissl/run.py --preset small-{name}``; about an hour on one GPU with 12 GB is an estimate,
    not a measurement. Global CG stopped at the noise of two batches, one solve an alternation; bfloat16 first-order
    steps. Fine-tuning takes {epochs} epochs at the paper's rates, which were
    chosen for backbones trained twenty times longer: scores are not comparable to the paper's.
    {reported(name)}
    """
    return preset


def _changed(config: Config, name: str, changes: dict[str, dict[str, Any]]) -> Config:
    sections = {section: getattr(config, section).model_copy(update=fields) for section, fields in changes.items()}
    return config.model_copy(update={"preset": name, **sections})
