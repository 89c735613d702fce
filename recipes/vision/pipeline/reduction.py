"""How small a picture may be kept so that its views are those of the original, nearly."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..views.crops import Size, central_box
from ..views.evaluation_view import EvalView
from ..views.view_policy import ViewPolicy

View = ViewPolicy | EvalView | int
"""What is made of a picture: a random view, an evaluation's, or the central square of so many pixels, left uint8."""

MARGIN = 4
"""Sides of the view that the smallest crop of a kept picture has. A crop in a reduced picture begins and ends at one of
its own pixels: at twice the view's side the mean error of a view is 1.3/255 on photographs, at 4 times 0.7/255."""

WORTH = 0.5
"""The share of its pixels down to which a picture must shrink: a smaller gain is not worth any error."""


def kept_size(size: Size, views: Sequence[View]) -> Size:
    """The size at which a picture of `size` is kept: its own, or a reduced one.

    At the reduced one the smallest crop that any view may take, and the shorter side of an evaluation's picture, is
    `MARGIN` times as long as what is made of it.
    """
    height, width = size
    scale = max(MARGIN * _side(view) / _smallest(view, height, width) for view in views)
    return size if scale**2 > WORTH else (math.ceil(height * scale), math.ceil(width * scale))


def needs(views: Sequence[View]) -> list[list[float]]:
    """All that decides `kept_size` of the views, as JSON values."""
    found = set()
    for view in views:
        random = (*view.crop_scale, *view.crop_ratio) if isinstance(view, ViewPolicy) else ()
        found.add((float(_side(view)), *random))
    return [[MARGIN, WORTH], *(list(numbers) for numbers in sorted(found))]


def _side(view: View) -> int:
    """Of what the smallest crop is resized to."""
    if isinstance(view, ViewPolicy):
        return view.size
    # A task that is given whole squares cuts from them itself.
    return view.resize if isinstance(view, EvalView) else 2 * view


def _smallest(view: View, height: int, width: int) -> float:
    """The shortest side of any crop that the view may take."""
    if not isinstance(view, ViewPolicy):
        return min(height, width)
    narrow, wide = view.crop_ratio
    drawn = math.sqrt(view.crop_scale[0] * height * width * min(narrow, 1 / wide))
    return min(drawn, *central_box(view.crop_ratio, height, width)[2:])
