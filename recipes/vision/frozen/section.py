"""The fields of a configuration that say what features of pictures are."""

from typing import Literal

from pydantic import Field, model_validator

from ...experiment.configuration import Section
from ..networks.backbones import check_backbone

TINY, USUAL, OF_BACKBONES = 16, 32, 224
"""Sides of pictures (px): up to which pixels are features enough, and where none is given."""


class FrozenSection(Section):
    """What a model sees of a picture. Nothing of it is trained by the run."""

    features: Literal["auto", "pixels", "patches", "backbone"] = Field(
        default="auto",
        description="pixels: the picture itself, for tiny ones; patches: responses to patches of the data's own "
        "pictures; backbone: a network's; auto: backbone where one is named, else pixels up to 16 px, else patches",
    )
    image_size: int | None = Field(
        default=None,
        ge=8,
        le=1024,
        description="side that pictures are brought to (px); null: 224 for a backbone, 8 for digits, else 32",
    )
    backbone: str | None = Field(default=None, description="any name that bissl's model.backbone takes")
    init_backbone: str | None = Field(
        default=None, description="its weights: a file, or the folder of an artifact of bissl; null: random ones"
    )
    filters: int = Field(default=128, ge=1, description="of patches; each makes 8 features")
    batch_size: int = Field(default=256, ge=1, description="pictures a pass")

    @model_validator(mode="after")
    def _together(self) -> "FrozenSection":
        if self.backbone is None and (self.features == "backbone" or self.init_backbone is not None):
            raise ValueError("backbone: name the network that the features are of, such as resnet18")
        if self.backbone is not None and self.features in ("pixels", "patches"):
            raise ValueError(f"features: {self.features} are of no backbone; set it to backbone, or leave backbone out")
        if self.backbone is not None:
            check_backbone(self.backbone, self.image_size or OF_BACKBONES)
        return self

    def settled(self, native: int | None = None) -> "FrozenSection":
        """The same without an open choice, for pictures that are all of `native` px where that is not None."""
        usual = USUAL if native is None else native
        side = self.image_size or (usual if self.backbone is None else OF_BACKBONES)
        kind = "backbone" if self.backbone is not None else "pixels" if side <= TINY else "patches"
        return self.model_copy(
            update={"image_size": side, "features": kind if self.features == "auto" else self.features}
        )
