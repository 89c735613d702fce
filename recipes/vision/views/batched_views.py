"""Random views of a whole batch at once, on the device of its pictures: from uint8 crops, or crops and all.

Pixels lie as [N, x, 3, y], so that a linear step along x (a resize, a blur) is a weighted sum of a few contiguous rows,
and one along y is the same after a transposition. Parameters are read on the CPU alone: what depends on them, such as
the rows that an operation applies to, is worked out there and moved once, so that the host never waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from bilevel.training import transfer_to

from ..imagesets import IGNORED
from .crops import boxes
from .taps import blur_taps, resize_taps
from .view_policy import ViewParameters, ViewPolicy

SOLARIZE_THRESHOLD = 128 / 255
LUMA = (0.2989, 0.587, 0.114)
CPU_PIXELS = 32 * 96**2
"""Of the views that are made at a time on a CPU: their buffers then stay in its caches."""
DEVICE_CHUNK = 1024

BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY, NOTHING = range(6)
COLOURS = ("brightness", "contrast", "saturation", "hue")
"""In the numbering of `ViewParameters.order`."""


def checked_images(images: Tensor, parameters: ViewParameters | None = None) -> Tensor:
    """`images`, once they are found to be uint8 [N, 1 or 3, H, W] and as many as `parameters`; else ValueError."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.dtype != torch.uint8:
        raise ValueError(
            f"images must be uint8 of shape [N, 1 or 3, H, W], got {images.dtype} of shape {tuple(images.shape)}"
        )
    if parameters is not None and len(images) != len(parameters):
        raise ValueError(f"parameters describe {len(parameters)} views, but images has {len(images)}")
    return images


def moves(parameters: ViewParameters) -> bool:
    """Whether any view is rotated, shifted or zoomed."""
    return bool((parameters.angle != 0).any() | (parameters.zoom != 1).any() | (parameters.translate != 0).any())


def move_matrices(parameters: ViewParameters) -> Tensor:
    """For `affine_grid`, float32 [N, 2, 3]: output point p reads the input at R(-angle) (p - t) / zoom."""
    radians = torch.deg2rad(parameters.angle.double())
    cos, sin = radians.cos() / parameters.zoom, radians.sin() / parameters.zoom
    linear = torch.stack((torch.stack((cos, sin), -1), torch.stack((-sin, cos), -1)), -2)
    # grid_sample's coordinates run over [-1, 1]: a shift by the whole side is 2.
    offset = -2 * linear @ parameters.translate.double().unsqueeze(-1)
    return torch.cat((linear, offset), dim=-1).float()


def move(views: Tensor, matrices: Tensor) -> Tensor:
    """Views [N, 3, H, W] by `move_matrices`, bilinear, black outside."""
    grid = functional.affine_grid(matrices, list(views.shape), align_corners=False)
    return functional.grid_sample(views, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def normalize(views: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(views - mean) / std per channel, in place."""
    for channel, (centre, width) in enumerate(zip(mean, std, strict=True)):
        views[:, channel].sub_(centre).mul_(1 / width)
    return views


def _moved(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """CPU tensors of one type on `device`, by one transfer that the host does not wait for."""
    if device.type == "cpu":
        return list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    parts = transfer_to(device)(flat).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _as_rows(pixels: Tensor) -> Tensor:
    """Square views [n, x, 1 or 3, y] with values in [0, 1] as three channels."""
    return pixels.repeat(1, 1, 3, 1) if pixels.shape[2] == 1 else pixels


@dataclass(frozen=True, eq=False)
class _FloatCrops:
    """Crops from whole pictures of one size, uint8 [N, C, H, W], resized in float."""

    policy: ViewPolicy
    pictures: Tensor
    numbers: list[Tensor]
    longest: list[int]

    @classmethod
    def of(cls, policy: ViewPolicy, pictures: Tensor, parameters: ViewParameters) -> _FloatCrops:
        box = boxes(parameters.area, parameters.aspect, parameters.place, policy.crop_ratio, *pictures.shape[-2:])
        sides = [box.top, box.left, box.height, box.width]
        longest = [max(side.tolist(), default=0) for side in sides[2:]]
        return cls(policy, pictures, [*(side.float() for side in sides), parameters.flip.float()], longest)

    def numbers_of(self, part: slice) -> list[Tensor]:
        """What is moved to the device for some of the views."""
        return [number[part] for number in self.numbers]

    def pixels(self, part: slice, numbers: Sequence[Tensor]) -> Tensor:
        """[n, x, C, y], in [0, 1]."""
        (top, left, height, width, flip), policy = numbers, self.policy
        pictures = self.pictures[part]
        rows, columns = pictures.shape[-2:]
        down = resize_taps(policy.interpolation, top, height, None, policy.size, rows, self.longest[0])
        across = resize_taps(policy.interpolation, left, width, flip, policy.size, columns, self.longest[1])
        pixels = pictures.permute(0, 2, 1, 3).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        # Bicubic weights are partly negative and overshoot.
        return across.sums(down.sums(pixels).permute(0, 3, 2, 1)).clamp_(0, 1)


@dataclass(frozen=True, eq=False)
class _HostCrops:
    """Crops that are made already, uint8 [N, C, size, size]."""

    crops: Tensor
    flip: Tensor

    @cached_property
    def mirrors(self) -> bool:
        """Whether any is mirrored."""
        return bool(self.flip.any())

    def numbers_of(self, part: slice) -> list[Tensor]:
        """What is moved to the device for some of the views."""
        return [self.flip[part].float()]

    def pixels(self, part: slice, numbers: Sequence[Tensor]) -> Tensor:
        """[n, x, C, y], in [0, 1]."""
        crops = self.crops[part]
        if self.mirrors:
            crops = torch.where(numbers[0].view(-1, 1, 1, 1) > 0, crops.flip(-1), crops)
        return crops.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def _light(x: Tensor) -> Tensor:
    """Greyscale [n, x, 1, y], ITU-R 601."""
    red, green, blue = x.split(1, dim=2)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _turn_hue(x: Tensor, turns: Tensor) -> None:
    """Turn the hue of HSV by `turns` [n, 1, 1, 1], in place; value and saturation stay.

    On the colour circle red, green and blue lie at 0, 1/3 and 2/3 turns; with the channels scaled to lowest 0 and
    highest 1, hue is (1 + green + blue - red) / 6 turns away from red, towards green where green exceeds blue. The
    other way, a channel is 2 - 6 * (distance from its place), limited to [0, 1].
    """
    red, green, blue = x.split(1, dim=2)
    low = torch.minimum(torch.minimum(red, green), blue)
    spread = torch.maximum(torch.maximum(red, green), blue).sub_(low)
    towards = green - blue
    # Where the spread is 0 any hue gives the same grey.
    away = (green + blue).sub_(red).sub_(low).div_(spread.clamp_min(torch.finfo(x.dtype).tiny)).add_(1).clamp_min_(0)
    hue = torch.copysign(away, towards).mul_(1 / 6).add_(turns)
    for place, channel in enumerate((red, green, blue)):
        distance = hue - place / 3
        distance.sub_(distance.round()).abs_()
        torch.addcmul(low, spread, distance.mul_(-6).add_(2).clamp_(0, 1), out=channel)


def _change(operation: int, x: Tensor, value: Tensor) -> None:
    """One colour change of rows [n, x, 3, y] by their factors (turns of hue) [n], in place."""
    value = value.view(-1, 1, 1, 1)
    if operation == BRIGHTNESS:
        x.mul_(value)
    elif operation == CONTRAST:
        mean = _light(x.mean(dim=(1, 3), keepdim=True))
        x.mul_(value).add_(mean * (1 - value))
    elif operation == SATURATION:
        light = _light(x).mul_(1 - value)
        x.mul_(value).add_(light)
    elif operation == HUE:
        return _turn_hue(x, value)
    else:
        x.copy_(_light(x))
    x.clamp_(0, 1)


@dataclass(frozen=True, eq=False)
class _Round:
    """Rows lined up by what is done to them: `rows` says where each lay before, part k ends at `ends[k]`."""

    rows: Tensor
    values: Tensor
    ends: tuple[int, ...]

    def parts(self) -> list[tuple[int, slice]]:
        starts = (0, *self.ends)
        return [(k, slice(a, b)) for k, (a, b) in enumerate(zip(starts, self.ends, strict=False)) if a < b]


def _rounds(parameters: ViewParameters) -> tuple[list[_Round], _Round, Tensor]:
    """The colour rounds, the last one (blur, solarisation), and the rows that undo all lining up; all on the CPU."""
    strengths = torch.stack([getattr(parameters, name) for name in COLOURS], dim=1)
    changes = parameters.jitter.view(-1, 1) & (strengths != torch.tensor([1.0, 1.0, 1.0, 0.0]))
    colours = torch.where(changes.gather(1, parameters.order), parameters.order, NOTHING).T
    grey = torch.where(parameters.grey, GREY, NOTHING).unsqueeze(0)
    # The blurred are the first two kinds, the solarised the second and third.
    last = torch.where(parameters.blur, parameters.solarize.long(), 3 - parameters.solarize.long()).unsqueeze(0)
    values = torch.cat((strengths.gather(1, parameters.order).T, parameters.sigma.expand(2, -1)))
    kinds = torch.cat((colours, grey, last))
    busy = (kinds != NOTHING).any(dim=1)
    kinds, values = kinds[busy], values[busy]

    samples = kinds.argsort(dim=1, stable=True)
    places = samples.argsort(dim=1)
    before = torch.cat((torch.arange(len(parameters)).unsqueeze(0), places[:-1]))
    columns = zip(before.gather(1, samples), values.gather(1, samples), strict=True)
    ends = (kinds.unsqueeze(-1) <= torch.arange(NOTHING)).sum(dim=1).tolist()
    rounds = [_Round(rows, value, tuple(end)) for (rows, value), end in zip(columns, ends, strict=True)]
    return rounds[:-1], rounds[-1], places[-1]


def _blurred(x: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Gaussian blur of [n, x, 3, y], as [n, y, 3, x]."""
    taps = blur_taps(sigma, kernel_size, x.shape[1])
    return taps.sums(taps.sums(x).permute(0, 3, 2, 1))


def _write_views(
    policy: ViewPolicy,
    source: _FloatCrops | _HostCrops,
    part: slice,
    parameters: ViewParameters,
    out: Tensor,
) -> None:
    """Views of one chunk into `out`."""
    moving = moves(parameters)
    first = source.numbers_of(part)
    if not (parameters.jitter | parameters.grey | parameters.blur | parameters.solarize).any():
        *first, matrices = _moved([*first, move_matrices(parameters)], out.device)
        views = source.pixels(part, first).permute(0, 2, 3, 1)
        out.copy_(move(views, matrices) if moving else views)
        normalize(out, policy.mean, policy.std)
        return
    rounds, last, restoring = _rounds(parameters)
    numbers = [*first, move_matrices(parameters), last.values, *(step.values for step in rounds)]
    moved = _moved(numbers, out.device)
    first, (matrices, sigma, *values) = moved[: len(first)], moved[len(first) :]
    lined_up, restoring, *rows = _moved([last.rows, restoring, *(step.rows for step in rounds)], out.device)
    first_solarized, blurred, solarized = last.ends[:3]

    x = _as_rows(source.pixels(part, first))
    if moving:
        x = move(x.permute(0, 2, 3, 1), matrices).permute(0, 3, 1, 2).contiguous()
    for step, chosen, value in zip(rounds, rows, values, strict=True):
        x = x.index_select(0, chosen)
        for operation, affected in step.parts():
            _change(operation, x[affected], value[affected])
    x = x.index_select(0, lined_up)
    views = x.new_empty(len(x), 3, policy.size, policy.size)
    views[blurred:] = x[blurred:].permute(0, 2, 3, 1)
    if blurred:
        views[:blurred] = _blurred(x[:blurred], sigma[:blurred], policy.kernel_size).permute(0, 2, 1, 3)
    if first_solarized < solarized:
        inverted = views[first_solarized:solarized]
        inverted.copy_(torch.where(inverted >= SOLARIZE_THRESHOLD, 1 - inverted, inverted))
    torch.index_select(views, 0, restoring, out=out)
    normalize(out, policy.mean, policy.std)


def cpu_chunk(size: int) -> int:
    """Views of `size` px that are made at a time on a CPU."""
    return max(1, min(DEVICE_CHUNK, CPU_PIXELS // size**2))


def _views(
    policy: ViewPolicy, source: _FloatCrops | _HostCrops, parameters: ViewParameters, device: torch.device
) -> Tensor:
    views = torch.empty(len(parameters), 3, policy.size, policy.size, device=device)
    chunk = cpu_chunk(policy.size) if device.type == "cpu" else DEVICE_CHUNK
    for start in range(0, len(parameters), chunk):
        part = slice(start, start + chunk)
        _write_views(policy, source, part, parameters[part], views[part])
    return views


def views_of_pictures(policy: ViewPolicy, pictures: Tensor, parameters: ViewParameters) -> Tensor:
    """Random views of pictures of one size that lie on a device: cropped and resized there, in float.

    Crop, resize, flip, move, colour changes, grey, blur, solarisation and (x - mean) / std, in this order and each only
    where it was drawn; values lie in [0, 1] before the last.

    Args:
        policy: its `size`, `interpolation`, crop's ratio, kernel of the blur, mean and std are used; what is random is
            drawn already.
        pictures: uint8 ``[N, 1 or 3, H, W]`` on any device; greyscale ones become three equal channels.
        parameters: `N` drawn views, on the CPU, each with its own values and its own order of colour changes.

    Returns:
        float32 ``[N, 3, size, size]`` on the device of `pictures`. Sample by sample it is what torchvision's functions
        give one after another, but for float32 rounding, and for a pixel at the very threshold of solarisation (by
        1/255 before mean and std).

    Raises:
        ValueError: `pictures` has another type or shape, or another length than `parameters`.
    """
    checked_images(pictures, parameters)
    return _views(policy, _FloatCrops.of(policy, pictures, parameters), parameters, pictures.device)


def views_of_crops(policy: ViewPolicy, crops: Tensor, parameters: ViewParameters, rows: slice | None = None) -> Tensor:
    """The same from crops that are made and resized already, to uint8: what a worker process sends.

    They differ from `views_of_pictures` by the rounding of the resize, at most 2/255 before the colour changes.

    Args:
        policy, parameters: as for `views_of_pictures`; of the whole batch.
        crops: uint8 ``[n, 1 or 3, size, size]`` on any device, of all samples or of those in `rows`.
        rows: the samples that are made; the same bits as among all of them on a CPU.

    Returns:
        float32 ``[n, 3, size, size]`` on the device of `crops`.

    Raises:
        ValueError: as for `views_of_pictures`, or crops of another size.
    """
    start, stop, _ = slice(None).indices(len(parameters)) if rows is None else rows.indices(len(parameters))
    if crops.shape[-2:] != (policy.size, policy.size) or len(crops) != stop - start:
        raise ValueError(
            f"crops must be {stop - start} of {policy.size} px, got {len(crops)} of shape {tuple(crops.shape[1:])}"
        )
    checked_images(crops)
    if (start, stop) == (0, len(parameters)) or crops.device.type != "cpu":
        own = parameters[start:stop]
        return _views(policy, _HostCrops(crops, own.flip), own, crops.device)
    # Chunks as the whole batch has them, the other samples black: how a sum is rounded may hang on what lies around.
    chunk = cpu_chunk(policy.size)
    first, last = start - start % chunk, min(-(-stop // chunk) * chunk, len(parameters))
    filled = crops.new_zeros(last - first, *crops.shape[1:])
    filled[start - first : stop - first] = crops
    around = parameters[first:last]
    return _views(policy, _HostCrops(filled, around.flip), around, crops.device)[start - first : stop - first]


def masks_of_crops(masks: Tensor, parameters: ViewParameters | None, rows: slice) -> Tensor:
    """Masks that were cut as their pictures were, uint8 [n, size, size], mirrored and moved as these are.

    A mean of two classes is no class: every pixel takes the nearest one's, or `IGNORED` where there is none.

    Args:
        parameters: of the whole batch, of which the masks are those in `rows`; None: no random view, nothing changes.
    """
    if parameters is None:
        return masks
    own = parameters[rows]
    (flip,) = _moved([own.flip], masks.device)
    masks = torch.where(flip.view(-1, 1, 1), masks.flip(-1), masks)
    if not moves(parameters):
        return masks
    # Outside, where sampling gives 0, there must be no class.
    shifted = masks.unsqueeze(1).float() - IGNORED
    (matrices,) = _moved([move_matrices(own)], masks.device)
    grid = functional.affine_grid(matrices, list(shifted.shape), align_corners=False)
    sampled = functional.grid_sample(shifted, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return (sampled.squeeze(1) + IGNORED).to(torch.uint8)
