"""The paper's experiments: one preset a downstream set, all after the same pretext stage."""

from collections.abc import Callable
from textwrap import fill
from typing import Any

from ..config import (
    BilevelConfig,
    Config,
    DataConfig,
    DownstreamConfig,
    FinetuneConfig,
    HeadConfig,
    ModelConfig,
    PretextConfig,
)
from ..paper import TITLES, PaperEntry, PaperVersion, paper_entry

Preset = Callable[[PaperVersion], Config]

_CROP = {"crop_scale": (0.5, 1.0)}


def paper_preset(name: str) -> Preset:
    """The preset of the paper's experiment on the downstream set `name`, one of `TITLES`."""

    def preset(paper_version: PaperVersion = "v2") -> Config:
        entry = _entry(name, paper_version)
        lr, weight_decay = entry.upper
        return Config(
            preset=f"paper-{name}",
            paper_version=paper_version,
            seeds=10,
            data=DataConfig(pretext="stl10", downstream=name, image_size=96),
            model=ModelConfig(backbone="resnet18"),
            pretext=_pretext(paper_version),
            downstream=_downstream(name),
            head=HeadConfig(epochs=20, lr=lr, weight_decay=weight_decay),
            bissl=BilevelConfig(
                alternations=500,
                layerwise=True,
                through_negative_curvature=True,
                lower_lr=_warmup_lr(paper_version),
                upper_lr=lr,
                upper_weight_decay=weight_decay,
            ),
            finetune=FinetuneConfig(
                epochs=400,
                lr=entry.bissl[0],
                weight_decay=entry.bissl[1],
                baseline_lr=entry.baseline[0],
                baseline_weight_decay=entry.baseline[1],
            ),
        )

    preset.__doc__ = f"""{TITLES[name]} as in the paper: ResNet-18 at 96 px, batch 1024, layer-wise CG, ten seeds.

    Command: ``python recipes/bissl/run.py --preset paper-{name}``; for a GPU cluster, --dry-run estimates how
    long it takes. The numbers are those of Tables 2 to 4 and appendix B; ``--paper-version v1`` takes the first
    version's (warm-up and lower level at 4.8, other rates). With ``--artifacts DIR`` all paper presets share one
    pretext stage.
    {reported(name)}
    """
    return preset


def paper_literal(paper_version: PaperVersion = "v2") -> Config:
    """As paper-stl10, with the lower level at the text's 4.8 instead of the 1.0 of the authors' code.

    Command: ``python recipes/bissl/run.py --preset paper-literal``; cost as paper-stl10. The text says that the lower
    level follows the pretext training of section 4.2.1, whose learning rate is 4.8, and the second version lowers that
    of the warm-up alone. ``--paper-version v1`` has 4.8 in both already: there it is paper-stl10.
    """
    paper = paper_preset("stl10")(paper_version)
    return paper.model_copy(
        update={"preset": "paper-literal", "bissl": paper.bissl.model_copy(update={"lower_lr": 4.8})}
    )


def reported(name: str) -> str:
    """A sentence with the paper's scores for a set, broken into lines of a docstring."""
    scores = [
        f"{metric} {with_it[0]} +- {with_it[1]} with BiSSL and {without[0]} +- {without[1]} without"
        for metric, (with_it, without) in _entry(name, "v2").scores.items()
    ]
    sentence = f"The paper reports {'; '.join(scores)} (Table 1 of its second version)."
    return fill(sentence, 110, subsequent_indent="    ")


def _entry(name: str, version: PaperVersion) -> PaperEntry:
    entry = paper_entry(name, version)
    assert entry is not None, "presets are made for the sets of the paper"
    return entry


def _warmup_lr(version: PaperVersion) -> float:
    """The warm-up's peak, which the lower level continues at: that of section 4.2.1, until version 2 lowered it."""
    return 4.8 if version == "v1" else 1.0


def _pretext(version: PaperVersion) -> PretextConfig:
    """The same for every downstream set, so that one pretext run serves all of them."""
    return PretextConfig(
        options={
            "view1": {**_CROP, "blur_probability": 1.0},
            "view2": {**_CROP, "blur_probability": 0.1, "solarize_probability": 0.2},
        },
        epochs=500,
        batch_size=1024,
        lr=_warmup_lr(version),
        baseline_epochs=600,
        baseline_lr=4.8,
    )


def _downstream(name: str) -> DownstreamConfig:
    options: dict[str, Any] = {
        "view": {**_CROP, "jitter_probability": 0.0, "grey_probability": 0.0},
        "eval_resize": 109,
    }
    if name == "voc2007":
        # The authors' loss for several objects an image; the task's own default is binary cross-entropy.
        return DownstreamConfig(task="multilabel", options={**options, "loss_function": "softmax"}, batch_size=256)
    return DownstreamConfig(options=options, batch_size=256)
