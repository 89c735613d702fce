"""The segmentation of examples/: images and masks change together, what mean IoU counts, and that all stages run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score
from torch import Tensor, nn

from examples.segmentation import CLASSES, SIDE, PastedDigits, Segmentation
from recipes.bissl.commands.main import main
from recipes.bissl.tasks.classification import Classification
from recipes.vision.errors import DataError
from recipes.vision.imagesets import IGNORED, DownstreamSets, ImageSet
from recipes.vision.mean_iou import mean_iou
from recipes.vision.pictures.memory import ArrayImages
from recipes.vision.pipeline.loader import Loader
from recipes.vision.pipeline.workers import Workers
from recipes.vision.sources.loading import load_downstream, load_pretext
from recipes.vision.views.crops import boxes
from recipes.vision.views.view_policy import draw
from tests.support.recipes.small_runs import SMALL_OPTIONS, execute, refused, results

SOURCE = "examples.segmentation:PastedDigits"
NAMED = [
    "--downstream.task=examples.segmentation:Segmentation",
    f"--data.pretext={SOURCE}",
    f"--data.downstream={SOURCE}",
    f"--data.image-size={SIDE}",
    "--data.labels-per-class=null",
    "--data.val-per-class=null",
]
SHORT = ["--pretext.epochs=1", "--head.epochs=1", "--finetune.epochs=2", "--seeds=1", "--bissl.upper-steps=1"]


def make_task(**options: Any) -> Segmentation:
    return Segmentation.model_validate({"image_size": SIDE, "classes": CLASSES, **options})


def checkers(count: int = 6) -> Tensor:
    """Masks [count, SIDE, SIDE] of 0 and 1 in blocks of 4 px, no two alike."""
    blocks = torch.randint(2, (count, SIDE // 4, SIDE // 4), generator=torch.Generator().manual_seed(0))
    return blocks.repeat_interleave(4, 1).repeat_interleave(4, 2).to(torch.uint8)


def view(task: Segmentation, masks: Tensor, train: bool = True, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Of images that are white where the mask is 1 and black where it is 0."""
    declared = task.train_view() if train else task.evaluation_view()
    loader = Loader(ArrayImages(255 * masks[:, None]), (declared,), Workers(0), masks=masks)
    (inputs,), (targets,) = loader.finish(loader.begin(torch.arange(len(masks)), seed))
    return task.transform(inputs, targets, torch.Generator(), train)


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize(("crop", "flip"), [(0.36, 0.5), (1.0, 0.5), (0.64, 0.0)])
def test_image_and_mask_stay_aligned(crop: float, flip: float, axis: int) -> None:
    # Stripes along one axis, so that the image passes through grey exactly where the nearest pixel changes.
    stripes = checkers(6).select(axis, 0).unsqueeze(axis).expand(-1, SIDE, SIDE)
    inputs, targets = view(make_task(smallest_crop=crop, flip_probability=flip), stripes)
    assert targets.dtype == torch.int64
    assert set(targets.unique().tolist()) == {0, 1}
    clear = inputs[:, 0].abs() > 0.01
    assert torch.equal((inputs[:, 0] > 0)[clear], (targets == 1)[clear])
    assert clear.float().mean() > 0.95
    if crop < 1.0:
        assert not torch.equal(targets, stripes.long())


def test_flips_are_left_to_right_of_some_images() -> None:
    masks = checkers(40)
    _, targets = view(make_task(smallest_crop=1.0, flip_probability=0.5), masks)
    flipped = [bool((target == mask.flip(1)).all()) for target, mask in zip(targets, masks, strict=True)]
    same = [bool((target == mask).all()) for target, mask in zip(targets, masks, strict=True)]
    assert all(a != b for a, b in zip(flipped, same, strict=True))
    assert 8 < sum(flipped) < 32


def test_crops_lie_inside_the_image() -> None:
    view = make_task(smallest_crop=0.25, flip_probability=0.5).train_view()
    drawn = draw(view, 200, torch.Generator().manual_seed(0))
    crops = boxes(drawn.area, drawn.aspect, drawn.place, view.crop_ratio, SIDE, SIDE)
    assert torch.equal(crops.height, crops.width)
    assert SIDE // 2 <= int(crops.height.min()) < 12 < 18 < int(crops.height.max()) <= SIDE
    for start in (crops.top, crops.left):
        assert int(start.min()) == 0
        assert int((start + crops.height).max()) == SIDE


def test_evaluation_changes_nothing_and_unknown_pixels_stay_unknown() -> None:
    masks = checkers()
    masks[0, :4] = IGNORED
    inputs, targets = view(make_task(), masks, train=False)
    np.testing.assert_array_equal(targets.numpy(), masks.numpy())
    np.testing.assert_allclose(inputs[1].numpy(), np.repeat(masks[1:2].numpy() * 2.0 - 1.0, 3, axis=0), atol=1e-6)
    _, cropped = view(make_task(), masks)
    assert set(cropped.unique().tolist()) == {0, 1, IGNORED}


def test_loss_leaves_unknown_pixels_out() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(2, 3, 4, 4, generator=generator)
    targets = torch.randint(3, (2, 4, 4), generator=generator)
    targets[0, :2] = IGNORED
    scores = outputs.double().permute(0, 2, 3, 1).numpy()
    logs = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    known = targets.numpy() != IGNORED
    expected = -np.mean(logs[known][np.arange(known.sum()), targets.numpy()[known]])
    assert float(make_task().loss(outputs, targets)) == pytest.approx(expected, rel=1e-5)


def test_mean_iou_of_the_whole_set_is_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(7, 5, 6, 6, generator=generator)
    outputs[:, 4] = -9.0
    # Class 3 is predicted and never true, class 4 neither.
    targets = torch.randint(3, (7, 6, 6), generator=generator)
    targets[2:4, :3] = IGNORED
    metric, state = mean_iou(5), None
    for part in (slice(0, 3), slice(3, 7)):
        state = metric.accumulate(state, outputs[part], targets[part])
    assert state is not None
    known = targets != IGNORED
    true, found = targets[known].numpy(), outputs.argmax(dim=1)[known].numpy()
    expected = 100.0 * jaccard_score(true, found, labels=[0, 1, 2, 3], average="macro")
    assert metric.compute(state) == pytest.approx(float(expected), rel=1e-9)
    assert metric.higher_is_better


def test_mean_iou_refuses_what_it_cannot_count() -> None:
    metric = mean_iou(2)
    with pytest.raises(ValueError, match=r"outputs \[N, 2, H, W\]"):
        metric.accumulate(None, torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64))
    nothing = torch.full((1, 4, 4), IGNORED)
    with pytest.raises(ValueError, match="no pixel of the set has a class"):
        metric.compute(metric.accumulate(None, torch.zeros(1, 2, 4, 4), nothing))


def test_the_head_scores_every_pixel_of_the_feature_map() -> None:
    class Map(nn.Module):
        num_features = 2

        def forward(self, x: Tensor, feature_map: bool = False) -> Tensor:
            assert feature_map
            return x[:, :2, ::4, ::4]

    task, backbone = make_task(), Map()
    head = task.build(backbone)
    inputs = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    outputs = task.forward(backbone, head, inputs)
    weight, bias = (p.detach()[..., 0, 0] if p.dim() == 4 else p.detach() for p in head.parameters())
    scores = torch.einsum("cf,nfhw->nchw", weight, inputs[:, :2, ::4, ::4]) + bias[:, None, None]
    assert outputs.shape == (2, len(CLASSES), SIDE, SIDE)
    # At a corner, upsampling without aligned corners repeats the outermost value.
    torch.testing.assert_close(outputs[:, :, 0, 0], scores[:, :, 0, 0])


def test_the_images_are_digits_on_a_texture_and_the_masks_where_they_are() -> None:
    sets = load_downstream(SOURCE, root=".", download=False)
    assert (len(sets.train), len(sets.val), len(sets.test), sets.kind) == (40, 20, 200, "segmentation")
    images, masks = sets.train.images.stacked()[:, 0], sets.train.labels
    assert masks is not None
    assert set(masks.unique().tolist()) == {0, 1, 2, 3, 4, IGNORED}
    assert images[(masks != 0) & (masks != IGNORED)].min() > 127
    for mask in masks:
        # One digit an image, no larger than 16 px.
        assert len(set(mask.unique().tolist()) - {0, IGNORED}) == 1
        rows, columns = (mask != 0).any(1).nonzero(), (mask != 0).any(0).nonzero()
        assert rows.max() - rows.min() < 16 > columns.max() - columns.min()
    pretext = load_pretext(SOURCE, root=".", download=False)
    assert (len(pretext), pretext.labels) == (240, None)
    held_out = {image.numpy().tobytes() for image in sets.test.images.stacked()}
    assert not held_out & {image.numpy().tobytes() for image in pretext.images.stacked()}
    assert len(PastedDigits().part("val")) == 20


def masked(masks: Tensor, side: int = 4) -> ImageSet:
    return ImageSet(torch.zeros(3, 1, side, side, dtype=torch.uint8), masks, ("a", "b"), "maps")


def test_masks_are_labels_of_their_own_kind() -> None:
    masks = torch.zeros(3, 4, 4, dtype=torch.uint8)
    masks[1, 2, 3], masks[2, 0, 0] = 1, IGNORED
    assert masked(masks).kind == "segmentation"
    assert torch.equal(masked(masks).subset([2, 1]).labels, masks[[2, 1]])  # type: ignore[arg-type]
    masks[1, 2, 3] = 2
    with pytest.raises(DataError, match="maps: the mask of image 1 has class 2 in row 2, column 3, but 2 classes"):
        masked(masks)
    with pytest.raises(DataError, match="maps: masks of 4x4 px do not fit images of 5x5 px"):
        masked(torch.zeros(3, 4, 4, dtype=torch.uint8), side=5)
    with pytest.raises(DataError, match="one row for each of the 3 images, got 2 rows"):
        masked(torch.zeros(2, 4, 4, dtype=torch.uint8))


class Masks:
    """A source of masks alone."""

    def pretext(self) -> ImageSet:
        return masked(torch.zeros(3, 4, 4, dtype=torch.uint8))

    def downstream(self) -> DownstreamSets:
        part = self.pretext()
        return DownstreamSets(part, part, part, {name: [0, 1, 2] for name in ("train", "val", "test")})


def test_masks_have_no_classes_of_images_to_cap() -> None:
    with pytest.raises(DataError, match="labels_per_class = 1 needs classes, but these are masks of a segmentation"):
        load_downstream(f"{__name__}:Masks", root=".", download=False, labels_per_class=1)
    assert Classification.labels != Segmentation.labels == "segmentation"


def test_all_stages_of_both_arms(tmp_path: Path) -> None:
    assert main([*SMALL_OPTIONS, *NAMED, *SHORT, f"--output-dir={tmp_path}"]) == 0
    found = results(tmp_path)
    assert found["primary_metric"] == "miou"
    for arm in ("bissl", "baseline"):
        assert 0.0 <= found["variants"][arm]["miou"]["mean"] <= 100.0


def test_bad_options_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = '--downstream.options={"smallest_crop": 2}'
    message = refused(capsys, *NAMED, options, f"--output-dir={tmp_path}")
    assert "downstream.options.smallest_crop" in message
    assert execute(*NAMED, "--dry-run", f"--output-dir={tmp_path}") == 0
