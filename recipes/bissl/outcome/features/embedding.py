"""Two-dimensional embeddings of features by t-SNE."""

from typing import Literal

import numpy as np

from ....experiment.errors import ConfigError
from .extraction import Array

Method = Literal["sklearn", "opentsne"]


def tsne(features: Array, *, method: Method = "sklearn", perplexity: float = 30.0, seed: int = 0) -> Array:
    """t-SNE coordinates ``[N, 2]`` of features ``[N, d]``, started from their first two principal components.

    Distances are Euclidean. The same input, seed and library versions give the same coordinates.

    Args:
        features: Finite.
        method: scikit-learn's Barnes-Hut, or openTSNE's interpolation, made for many points.
        perplexity: How many neighbours a point has, about; below a third of N.
        seed: Of the principal components' and the optimiser's random draws.

    Raises:
        ConfigError: the perplexity is out of range, features are not finite, or the library is not installed.

    Source: van der Maaten and Hinton, "Visualizing Data using t-SNE" (2008).
    """
    if not np.isfinite(features).all():
        raise ConfigError("features: some are not finite, so that the backbone's weights or images are damaged")
    if not 1 <= perplexity <= len(features) / 3:
        raise ConfigError(
            f"--perplexity: must be between 1 and a third of the points, {len(features)}, got {perplexity:g}"
        )
    return _opentsne(features, perplexity, seed) if method == "opentsne" else _sklearn(features, perplexity, seed)


def _sklearn(features: Array, perplexity: float, seed: int) -> Array:
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ConfigError(f'features needs scikit-learn ({error}); run: pip install "bilevel[demo]"') from error
    made = TSNE(2, perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed).fit_transform(features)
    return np.asarray(made, dtype=np.float64)


def _opentsne(features: Array, perplexity: float, seed: int) -> Array:
    try:
        from openTSNE import TSNE  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError(
            f'--method: opentsne is not installed ({error}); run: pip install "bilevel[opentsne]"'
        ) from error
    made = TSNE(2, perplexity=perplexity, initialization="pca", random_state=seed).fit(features)
    return np.asarray(made, dtype=np.float64)
