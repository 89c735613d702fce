"""Tasks as a user might write them, in a file of their own: neither is bundled, neither is a classification."""

from collections.abc import Iterable, Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from recipes.bissl.tasks.base import Bound, DownstreamTask, PretextTask
from recipes.vision.losses import nt_xent
from recipes.vision.metrics import Metric, State
from recipes.vision.views.view_policy import ViewPolicy


class Colour(PretextTask):
    """Predict an image's mean from a noisy copy, near the prediction of a slowly moving target."""

    stops_gradients = True
    noise: float = Field(default=0.1, ge=0, description="standard deviation of the noise")

    def build(self, backbone: nn.Module) -> nn.ModuleDict:
        features = int(backbone.num_features)  # type: ignore[arg-type]
        heads = nn.ModuleDict({"decoder": nn.Linear(features, 3), "target": nn.Linear(features, 3)})
        heads["target"].load_state_dict(heads["decoder"].state_dict())
        heads["target"].requires_grad_(False)
        return heads

    def transform(self, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        clean = images.expand(-1, 3, -1, -1) / 255
        noise = self.noise * torch.randn(clean.shape, generator=generator)
        return {"noisy": clean + noise.to(clean.device), "mean": clean.mean(dim=(2, 3))}

    def loss(self, backbone: Bound, heads: Mapping[str, Bound], batch: dict[str, Tensor]) -> Tensor:
        features = backbone(batch["noisy"])
        prediction = heads["decoder"](features)
        return nn.functional.mse_loss(prediction, 0.9 * batch["mean"] + 0.1 * heads["target"](features).detach())

    def after_step(self, backbone: nn.Module, heads: nn.ModuleDict, step: int) -> None:
        with torch.no_grad():
            for slow, fast in zip(heads["target"].parameters(), heads["decoder"].parameters(), strict=True):
                slow.lerp_(fast, 0.1)

    def optimizer(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(list(parameters), lr=0.01 * lr)


def _accumulate(state: State | None, outputs: Tensor, targets: Tensor) -> State:
    error, count = (outputs - targets).abs().sum(), torch.tensor(len(targets))
    return (error, count) if state is None else (state[0] + error, state[1] + count)


class Brightness(DownstreamTask):
    """Regression of the mean brightness from the feature map, with inputs that are no single tensor."""

    def build(self, backbone: nn.Module) -> nn.Module:
        features = int(backbone.num_features)  # type: ignore[arg-type]
        return nn.Sequential(nn.BatchNorm1d(features), nn.Linear(features, 1))

    def transform(
        self, images: Tensor, targets: Tensor, generator: torch.Generator, train: bool
    ) -> tuple[dict[str, Tensor], Tensor]:
        image = images.expand(-1, 3, -1, -1) / 255
        return {"image": image}, image.mean(dim=(1, 2, 3))

    def forward(self, backbone: Bound, head: Bound, inputs: dict[str, Tensor]) -> Tensor:
        return head(backbone(inputs["image"], feature_map=True).mean(dim=(2, 3))).squeeze(1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)

    def metrics(self) -> dict[str, Metric]:
        return {"error": Metric(_accumulate, lambda state: float(state[0] / state[1]), higher_is_better=False)}


class MultiCrop(PretextTask):
    """Four small crops of an image near two large ones, among those of other images; some crops' brightness changes."""

    small: int = Field(default=16, ge=1, description="side of a small crop (px)")

    def build(self, backbone: nn.Module) -> nn.ModuleDict:
        return nn.ModuleDict({"projector": nn.Linear(int(backbone.num_features), 16)})  # type: ignore[arg-type]

    def random_views(self) -> tuple[ViewPolicy, ...]:
        large = ViewPolicy(size=self.image_size, crop_scale=(0.4, 1.0))
        return (large,) * 2 + (ViewPolicy(size=self.small, crop_scale=(0.05, 0.4), blur_probability=0.5),) * 4

    def transform(
        self, images: tuple[Tensor, ...], generator: torch.Generator, *, rows: slice, count: int
    ) -> tuple[Tensor, ...]:
        factors = 0.5 + torch.rand(count, len(images), generator=generator)[rows]
        return tuple(view * factors[:, i, None, None, None].to(view.device) for i, view in enumerate(images))

    def loss(self, backbone: Bound, heads: Mapping[str, Bound], batch: tuple[Tensor, ...]) -> Tensor:
        found = [heads["projector"](backbone(view)) for view in batch]
        return nt_xent(torch.stack(found[:2]).mean(dim=0), torch.stack(found[2:]).mean(dim=0), temperature=0.5)

    def embed(self, backbone: Bound, heads: Mapping[str, Bound], batch: tuple[Tensor, ...]) -> Tensor:
        return heads["projector"](backbone(batch[0]))


class Faulty(PretextTask):
    """Has a fault that shows in the first step."""

    def build(self, backbone: nn.Module) -> nn.ModuleDict:
        return nn.ModuleDict({"head": nn.Linear(1, 1)})

    def transform(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return images.expand(-1, 3, -1, -1) / 255

    def loss(self, backbone: Bound, heads: Mapping[str, Bound], batch: Tensor) -> Tensor:
        raise ZeroDivisionError("a fault of the task")


class Unfinished(PretextTask):
    """Says nothing of its loss."""

    def build(self, backbone: nn.Module) -> nn.ModuleDict:
        return nn.ModuleDict()


not_a_class = 3
