"""Confident learning by cleanlab, where it is installed."""

import warnings
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray


def confident_learning(labels: NDArray[np.int64], chances: NDArray[np.float64]) -> tuple[NDArray, NDArray] | None:
    """How wrong each label looks, float [N], high for suspicious ones, and which are called wrong, bool [N]; None
    without cleanlab.

    Args:
        labels: [N], as they are given.
        chances: [N, C], probabilities by models that have not seen the sample.

    Source: Northcutt, Jiang and Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels" (2021).
    """
    if find_spec("cleanlab") is None:
        return None
    with warnings.catch_warnings():
        # Of its own dependencies, and of classes in which it finds nothing.
        warnings.simplefilter("ignore")
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores

        quality = get_label_quality_scores(labels, chances, method="normalized_margin", adjust_pred_probs=True)
        issues = find_label_issues(labels, chances, n_jobs=1)
    return -np.asarray(quality, dtype=np.float64), np.asarray(issues, dtype=np.bool_)
