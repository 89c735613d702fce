"""The card of an exported backbone: what it is, how it was made, what it scored, and how to load it."""

import re
from collections.abc import Mapping
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ...experiment.artifacts import Artifact
from ...vision.networks.backbones import BACKBONES
from ...vision.networks.timm_backbones import TIMM, timm_options
from ...vision.networks.torchvision_backbones import network_options, resnets
from ..settings.arms import SCRATCH
from ..settings.config import Config
from ..training.costs import costs_of

_HOW = {
    "pretext": "self-supervised pre-training alone",
    "restart": "self-supervised pre-training, with a second run of the learning rate in place of the bilevel stage",
    "head": "self-supervised pre-training alone; a downstream head was fitted beside it",
    "bissl": "self-supervised pre-training, then bilevel training with the downstream task (BiSSL); not fine-tuned",
    "finetune": "pre-training as the arm has it, then fine-tuning on the labelled set; the best validation epoch",
}

_TEMPLATE = """\
# {name}, {stage} ({arm}, seed {seed})

{summary}

| | |
|---|---|
| Licence | {licence} |
| File | `{weights}`, SHA-256 `{digest}` |
| Backbone | `{backbone}`, images of {image_size} px |
| Pretext task and data | `{pretext_task}` on `{pretext_data}`, {pretext_steps} steps |
| Downstream task and data | `{downstream_task}` on `{downstream_data}`, {label_steps} labelled steps so far |
| Initial weights | {initial} |
| Computing | {seconds:.0f} s, stages before this one included |
| Made with | torch {torch}, torchvision {torchvision}, preset `{preset}`; every setting is in `config.json` |

## Loading

```python
{snippet}
```

{after}

## Scores

{scores}

## Intended use

Features for images like those it was trained on, and a start for fine-tuning. Inputs are RGB images in [0, 1], resized
to {image_size} px and normalised as the view options in `config.json` say. It was evaluated on the data named above
and on nothing else; bias and robustness were not examined. The licences of the data sets bind their users too.
"""


def model_card(
    artifact: Artifact,
    config: Config,
    weights: str,
    digest: str,
    *,
    licence: str | None,
    results: Mapping[str, Any] | None,
) -> str:
    """The card as markdown.

    Args:
        weights: name of the file beside the card.
        digest: SHA-256 of its bytes.
        licence: of the weights; None: the card says that none is stated.
        results: content of the run's results.json, for the arm's mean over all seeds.
    """
    info, costs = artifact.info, costs_of(artifact)
    snippet, after = loading_snippet(config.model.backbone, config.data.image_size, weights)
    return _TEMPLATE.format(
        name=config.model.backbone,
        stage=_plain(artifact.stage),
        arm=_plain(f"arm {info['variant']}") if "variant" in info else "shared by arms",
        seed=_plain(info.get("seed", config.seed)),
        summary=f"Weights after {_HOW.get(artifact.stage) or _plain(artifact.stage)}.",
        licence=_plain(licence or "not stated"),
        weights=weights,
        digest=digest,
        backbone=config.model.backbone,
        image_size=config.data.image_size,
        pretext_task=config.pretext.task,
        pretext_data=_code(config.data.pretext),
        pretext_steps=costs.pretext_steps,
        downstream_task=config.downstream.task,
        downstream_data=_code(config.data.downstream),
        label_steps=costs.label_steps,
        initial=_initial(config, info),
        seconds=costs.seconds,
        torch=torch.__version__,
        torchvision=version("torchvision"),
        preset=config.preset,
        snippet=snippet,
        after=after,
        scores=_scores(info, results),
    )


def loading_snippet(backbone: str, image_size: int, weights: str) -> tuple[str, str]:
    """Lines of Python that load the weights, into plain torchvision or timm where it has the network; and a remark."""
    read = f'load_file("{weights}")'
    if backbone.startswith(TIMM):
        name = backbone.removeprefix(TIMM)
        options = "".join(f", {key}={value!r}" for key, value in timm_options(name, image_size).items())
        lines = [
            "import timm",
            "from safetensors.torch import load_file",
            f'network = timm.create_model("{name}", num_classes=0{options})',
            f"network.load_state_dict({read})",
        ]
        return "\n".join(lines), f"`network(x)` gives the pooled features. Made with timm {version('timm')}."
    if backbone in resnets():
        lines = [f'network = torchvision.models.get_model("{backbone}", weights=None)']
    elif backbone == "resnet18-cifar":
        lines = [
            'network = torchvision.models.get_model("resnet18", weights=None)',
            "network.conv1, network.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()",
        ]
    elif backbone in BACKBONES or ":" in backbone or backbone.startswith("mnasnet"):
        lines = [
            "from safetensors.torch import load_file",
            "from bilevel.recipes.vision.networks.backbones import build_backbone",
            f'network = build_backbone("{backbone}", image_size={image_size})',
            f"network.load_state_dict({read})",
        ]
        return "\n".join(lines), "The network is one of the recipe's; `network(x)` gives its pooled features."
    else:
        options = "".join(f", {key}={value!r}" for key, value in network_options(backbone, image_size).items())
        lines = [
            "import torchvision",
            "from safetensors.torch import load_file",
            f'network = torchvision.models.get_model("{backbone}", weights=None{options})',
            f"network.load_state_dict({read}, strict=False)",
        ]
        return "\n".join(
            lines
        ), "The classifier is not in the file and stays as it was drawn; put your own in its place."
    body = [
        "import torch, torchvision",
        "from safetensors.torch import load_file",
        *lines,
        "network.fc = torch.nn.Identity()",
        f"network.load_state_dict({read})",
    ]
    return "\n".join(body), "`network(x)` gives the pooled features; put a classifier of your own in place of `fc`."


def _initial(config: Config, info: Mapping[str, Any]) -> str:
    """Where training began; stages after the first know the file's name alone."""
    start = info.get("initial_weights")
    if start is not None:
        return f"`{_code(start['file'])}`, SHA-256 `{_code(start['sha256'])}`"
    if config.model.init_backbone is None or info.get("variant") == SCRATCH:
        return "random"
    return f"`{_code(Path(config.model.init_backbone).name)}`"


def _scores(info: Mapping[str, Any], results: Mapping[str, Any] | None) -> str:
    """A table of this artifact's test metrics and the arm's over all seeds, as far as they are known."""
    own = info.get("test", {})
    arm = (results or {}).get("variants", {}).get(info.get("variant"), {})
    if not own:
        return "This stage is not tested by itself."
    lines = ["| test metric | these weights | mean and standard deviation over seeds |", "|---|---|---|"]
    for name, value in own.items():
        spread = arm.get(name)
        over_seeds = "" if not isinstance(spread, Mapping) else _spread(spread)
        lines.append(f"| {_plain(name)} | {_number(value)} | {over_seeds} |")
    return "\n".join(lines)


def _plain(text: Any) -> str:
    """Text of a file as words in markdown, in which neither markup nor a table's bar means anything."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", escape(" ".join(str(text).split()), quote=False))


def _code(text: Any) -> str:
    """Text of a file between backticks, which it cannot end."""
    return " ".join(str(text).split()).replace("`", "'").replace("|", r"\|")


def _spread(values: Mapping[str, Any]) -> str:
    mean, deviation = _number(values["mean"]), _number(values["std"])
    return f"{mean} ± {deviation} (n = {len(values['per_seed'])})"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
