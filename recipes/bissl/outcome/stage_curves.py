"""Draws the curves of each stage of a run for its report, a colour for each arm."""

from collections.abc import Sequence

from ...experiment.plots import Drawing, Panel, draw
from ...experiment.records import Event, bands, curves, select


def pretext_curves(events: Sequence[Event], arms: Sequence[str]) -> Drawing | None:
    """Loss, learning rate, k-NN accuracy and spread of the embeddings of the pretext stage, over steps."""
    train, monitor = select(events, "pretext", "train"), select(events, "pretext", "monitor")
    return draw(
        "pretext",
        [
            Panel("loss", "step", curves(train, "loss")),
            Panel("learning rate", "step", curves(train, "lr")),
            Panel("k-NN top-1 (%)", "step", curves(monitor, "knn_top1")),
            Panel("spread of the embeddings", "step", curves(monitor, "embedding_spread")),
        ],
        arms,
    )


def head_curves(events: Sequence[Event], arms: Sequence[str]) -> Drawing | None:
    """Training loss over steps and validation scores over epochs of the head's warm-up."""
    train, epochs = select(events, "head", "train"), select(events, "head", "epoch")
    return draw(
        "head", [Panel("training loss", "step", curves(train, "loss")), *_validation_panels(epochs)], arms, columns=3
    )


def levels_curves(events: Sequence[Event], arms: Sequence[str]) -> Drawing | None:
    """Loss, gradient norm and learning rate of both levels of the BiSSL stage, over each level's own steps."""
    panels = []
    for level in ("lower", "upper"):
        records = select(events, "bissl", level)
        panels += [
            Panel(f"{level} level: loss", f"{level} step", curves(records, "loss")),
            Panel(f"{level} level: gradient norm", f"{level} step", curves(records, "grad_norm"), logarithmic=True),
            Panel(f"{level} level: learning rate", f"{level} step", curves(records, "lr")),
        ]
    return draw("levels", panels, arms, columns=3)


def solver_curves(events: Sequence[Event], arms: Sequence[str]) -> Drawing | None:
    """How well the linear systems were solved, what the solution changed, and what it cost, over alternations; and the
    last solve's residual over its iterations."""
    upper = select(events, "bissl", "upper")
    shown = (
        ("relative residual", "residual", True, False),
        ("‖x − v‖ / ‖v‖", "relative_change", False, False),
        ("cos(x, v)", "cosine", False, False),
        ("lower stationarity", "stationarity", True, False),
        ("lower stationarity / its noise", "stationarity_over_noise", True, False),
        ("smallest Ritz value", "ritz_min", False, False),
        ("largest Ritz value", "ritz_max", False, False),
        ("smallest curvature met", "min_curvature", False, False),
        ("operator products a solve", "num_hvps", False, True),
    )
    panels = [
        Panel(title, "alternation", bands=bands(upper, name, x="alternation"), logarithmic=logarithmic, integer=integer)
        for title, name, logarithmic, integer in shown
    ]
    last = curves(_last_solves(upper), "residual", x="iteration")
    panels.append(Panel("residual within the last solve", "iteration", last, logarithmic=True))
    return draw("solver", panels, arms, columns=3)


def finetune_curves(events: Sequence[Event], arms: Sequence[str]) -> Drawing | None:
    """Validation scores, validation loss and training loss of fine-tuning over epochs, one thin line a seed."""
    epochs = select(events, "finetune", "epoch")
    training = Panel("training loss", "epoch", curves(epochs, "train_loss", x="epoch"))
    return draw("finetune", [*_validation_panels(epochs), training], arms, columns=3)


def _validation_panels(epochs: Sequence[Event]) -> list[Panel]:
    """A panel for each `val_*` quantity that was recorded, the loss last."""
    names = dict.fromkeys(name for record in epochs for name in record if name.startswith("val_"))
    ordered = sorted(names or ("val_loss",), key=lambda name: name == "val_loss")
    return [
        Panel(f"validation {name.removeprefix('val_')}", "epoch", curves(epochs, name, x="epoch")) for name in ordered
    ]


def _last_solves(upper: Sequence[Event]) -> list[Event]:
    """The iterations of each arm's and seed's last solve as events with `iteration` (from 1) and `residual`."""
    latest = {(record["variant"], record["seed"]): record for record in upper if record.get("residual_curve")}
    return [
        {**record, "iteration": number, "residual": residual}
        for record in latest.values()
        for number, residual in enumerate(record["residual_curve"], start=1)
    ]
