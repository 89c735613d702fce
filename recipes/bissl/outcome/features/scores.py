"""Scores of features: nearest neighbours, a linear probe, and the silhouette of their classes."""

import numpy as np
import torch

from ....experiment.errors import ConfigError
from ....vision.metrics import knn_accuracy
from .extraction import Array, LabelledFeatures, Labels

NEIGHBOURS = 20

DEFINITIONS = {
    "knn_top1": "percentage of the shown split's images that their nearest training images, by cosine similarity, vote "
    f"into the right class; the majority of {NEIGHBOURS} neighbours, or of as many as the average class has training "
    "images, if fewer",
    "linear_top1": "percentage of the shown split's images that a logistic regression on the training images' features "
    "classifies correctly; features standardised by the training images' mean and deviation, L2 penalty with C = 1",
    "silhouette_features": "mean silhouette of the shown points by class in the space of the features, Euclidean "
    "distances; from -1 (mixed) to 1 (separate and compact)",
    "silhouette_embedding": "the same of the points in the picture",
}
"""Score -> what it is exactly; all are better when higher."""


def feature_scores(train: LabelledFeatures, shown: LabelledFeatures) -> dict[str, float]:
    """k-NN and linear-probe accuracy of `shown` after `train`, in percent, as `DEFINITIONS` says.

    Raises:
        ConfigError: scikit-learn is not installed, or the training images are of one class.
    """
    classes = len(np.unique(train.labels))
    neighbours = min(NEIGHBOURS, max(1, len(train.labels) // classes))
    tensors = [torch.from_numpy(array) for part in (train, shown) for array in (part.features, part.labels)]
    return {"knn_top1": knn_accuracy(*tensors, neighbours=neighbours), "linear_top1": linear_probe(train, shown)}


def linear_probe(train: LabelledFeatures, shown: LabelledFeatures) -> float:
    """Accuracy in percent of a logistic regression on standardised features.

    Raises:
        ConfigError: scikit-learn is not installed, or the training images are of one class.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ConfigError(f'features needs scikit-learn ({error}); run: pip install "bilevel[demo]"') from error
    if len(np.unique(train.labels)) < 2:
        raise ConfigError("data.downstream: a linear probe needs training images of two classes at least")
    mean, deviation = train.features.mean(axis=0), train.features.std(axis=0)
    # A feature that never varies carries nothing; dividing it by 1 leaves it at 0.
    scale = np.where(deviation > 0, deviation, 1.0)
    probe = LogisticRegression(C=1.0, max_iter=2000)
    probe.fit((train.features - mean) / scale, train.labels)
    return 100.0 * float(np.mean(probe.predict((shown.features - mean) / scale) == shown.labels))


def silhouette(points: Array, labels: Labels) -> float | None:
    """Mean over the points of (b - a) / max(a, b); None where it is undefined: one class, or a class for every point.

    a is a point's mean Euclidean distance to the others of its class, b the smallest mean distance to another class.

    Raises:
        ConfigError: scikit-learn is not installed.

    Source: Rousseeuw, "Silhouettes" (1987).
    """
    try:
        from sklearn.metrics import silhouette_score
    except ImportError as error:
        raise ConfigError(f'features needs scikit-learn ({error}); run: pip install "bilevel[demo]"') from error
    if not 2 <= len(np.unique(labels)) < len(labels):
        return None
    return float(silhouette_score(points, labels))
