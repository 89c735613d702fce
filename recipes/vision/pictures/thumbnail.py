"""Pictures for a page."""

from __future__ import annotations

import io

from PIL import Image
from torch import Tensor


def png(picture: Tensor, longest: int) -> bytes:
    """A picture, uint8 [1 or 3, H, W], as the bytes of a PNG file; its longer side at most `longest` px.

    Each pixel of a tiny one becomes a square, since browsers would smooth it.
    """
    image = Image.fromarray(picture.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((longest, longest))
    larger = longest // max(image.size)
    if larger > 1:
        image = image.resize((larger * image.width, larger * image.height), Image.Resampling.NEAREST)
    content = io.BytesIO()
    image.save(content, format="PNG")
    return content.getvalue()
