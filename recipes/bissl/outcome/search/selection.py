"""Which trial a search chooses: the best balance of a high validation score and a low validation loss."""

from collections.abc import Sequence

from ....experiment.search.trial_record import Scores

TOLERANCE = 0.5


def near_best(finished: Sequence[tuple[int, Scores]], tolerance: float) -> tuple[list[int], int]:
    """Numbers of the trials within `tolerance` of the best score, lowest validation loss first; ties by number.

    The others follow by score, then loss, then number. `tolerance` has the unit of the metric (percentage points of an
    accuracy), its bound included.

    Returns:
        All numbers, and how many are within the tolerance.

    Source: BiSSL paper, appendix B.1, "best balance of high accuracy and low loss", made explicit.
    """
    higher = finished[0][1].higher_is_better
    best = (max if higher else min)(found.score for _, found in finished)
    shortfall = {n: best - found.score if higher else found.score - best for n, found in finished}
    loss = {number: found.loss for number, found in finished}
    # Percentages of small sets are rounded: a difference of exactly the tolerance must count as within it.
    near = [number for number in loss if shortfall[number] <= tolerance + 1e-9]
    far = [number for number in loss if shortfall[number] > tolerance + 1e-9]
    near.sort(key=lambda number: (loss[number], number))
    far.sort(key=lambda number: (shortfall[number], loss[number], number))
    return near + far, len(near)
