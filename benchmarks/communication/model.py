"""What the steps of BiSSL exchange between ranks, counted from the sizes of a problem; no measurement."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

Messages = Counter[tuple[str, int]]
"""How often each collective is called, by its kind and bytes: those of an all-reduce's tensor, and of all the parts
that an all-gather puts together."""

FLOAT, CONTROL = 4, 8
"""Bytes of a number, and of a message that only controls: a vote, or how many rows a rank brings."""


@dataclass(frozen=True)
class Sizes:
    """Of a problem with a pretext task on `views` views of each image, in as many passes, all float32.

    Attributes:
        ranks: W.
        batch, labelled: global batches of the lower and the upper level (images); multiples of `ranks`.
        embedding: numbers that a sample brings to the pretext loss, all its views together.
        classes: numbers that it brings to the downstream loss.
        backbone, heads, head: parameters of theta, phi_P and phi_D.
        backbone_norms, head_norms: channels of each synchronised BatchNorm of theta and phi_P; none where local.
        joined, joined_upper: numbers in the running statistics of theta and phi_P, and of theta alone, that local
            BatchNorms have averaged after a step.
    """

    ranks: int
    batch: int
    labelled: int
    embedding: int
    classes: int
    backbone: int
    heads: int
    head: int
    backbone_norms: tuple[int, ...]
    head_norms: tuple[int, ...]
    joined: int = 0
    joined_upper: int = 0
    views: int = 2


@dataclass(frozen=True)
class Schedule:
    """One alternation; `layerwise` conjugate gradients measure their residual by one product more."""

    lower_steps: int = 20
    upper_steps: int = 8
    hessian_batches: int = 5
    iterations: int = 5
    layerwise: bool = True

    @property
    def products(self) -> int:
        """With A, for each upper step."""
        return self.iterations + self.layerwise


def channels(module: nn.Module) -> tuple[int, ...]:
    """Of every BatchNorm in `module`."""
    kinds = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm
    # torch's stubs give its layers' attributes no types.
    return tuple(int(layer.num_features) for layer in module.modules() if isinstance(layer, kinds))  # type: ignore[arg-type]


def sent(messages: Messages, ranks: int) -> float:
    """Bytes that a rank sends in ring algorithms: ``2 (W - 1) / W`` times an all-reduce's, half as much to gather."""
    factors = {"all-reduce": 2.0, "all-gather": 1.0}
    return sum(count * factors[kind] * (ranks - 1) / ranks * size for (kind, size), count in messages.items())


def times(count: int, messages: Messages) -> Messages:
    return Counter({message: count * number for message, number in messages.items()})


def forward(sizes: Sizes, gathers: Iterable[int], asked: int) -> Messages:
    """Of a pass that gathers tensors of these bytes; `asked` of them ask the ranks for their rows first."""
    found: Messages = Counter(("all-gather", size) for size in gathers)
    return found + Counter({("all-gather", CONTROL * sizes.ranks): asked})


def backward(gathers: Iterable[int]) -> Messages:
    """A gather's gradient is a sum over the ranks."""
    return Counter(("all-reduce", size) for size in gathers)


def second(gathers: Iterable[int]) -> Messages:
    """Backwards through a pass and its gradient: each gather's sum is gathered, and summed again."""
    gathers = list(gathers)
    return Counter(("all-gather", size) for size in gathers) + backward(gathers)


def norms(sizes: Sizes, layers: Iterable[int]) -> list[int]:
    """Each layer's count, means and sums of squares from every rank."""
    return [FLOAT * sizes.ranks * (2 * width + 1) for width in layers]


def pretext_gathers(sizes: Sizes) -> list[int]:
    """What a pass of the pretext loss gathers."""
    layers = sizes.views * (sizes.backbone_norms + sizes.head_norms)
    return [FLOAT * sizes.batch * sizes.embedding, *norms(sizes, layers)]


def reduced(*counts: int) -> Messages:
    """Means of as many numbers, each in one all-reduce."""
    return Counter(("all-reduce", FLOAT * count) for count in counts if count)


def votes(count: int) -> Messages:
    return Counter({("all-reduce", CONTROL): count})


def pretext_step(sizes: Sizes) -> Messages:
    """Embeddings and statistics both ways; the loss with the gradient; running statistics if local; one vote."""
    gathers = pretext_gathers(sizes)
    passes = forward(sizes, gathers, asked=1) + backward(gathers)
    return passes + reduced(sizes.backbone + sizes.heads + 1, sizes.joined) + votes(1)


lower_step = pretext_step
"""The regularizer needs no exchange."""


def product(sizes: Sizes, schedule: Schedule) -> Messages:
    """With A, its graphs rebuilt: three passes a batch, and one mean over all of them."""
    gathers = pretext_gathers(sizes)
    one = forward(sizes, gathers, asked=1) + backward(gathers) + second(gathers)
    return times(schedule.hessian_batches, one) + reduced(sizes.backbone)


def upper_step(sizes: Sizes, schedule: Schedule) -> Messages:
    """L_D at theta_P and at theta_D, their gradients, a solve, theta_D's statistics.

    Votes: on the right-hand side, on the first residual, one an iteration, one before each product, one at the end.
    """
    statistics = norms(sizes, sizes.backbone_norms)
    gathers = 2 * [FLOAT * sizes.labelled * sizes.classes, *statistics]
    labels = 2 * [CONTROL * sizes.labelled]
    passes = forward(sizes, gathers + labels, asked=2) + backward(gathers)
    gradients = reduced(1 + 2 * sizes.backbone + sizes.head)
    solve = times(schedule.products, product(sizes, schedule)) + votes(3 + schedule.iterations + schedule.products)
    return passes + gradients + solve + forward(sizes, statistics, asked=0) + reduced(sizes.joined_upper)


def system(sizes: Sizes, schedule: Schedule) -> Messages:
    """Once an alternation: a pass of every stored batch shows that L_P has no cross term, which is voted on; each one's
    mean gradient tells how stationary the lower level is, and how much of that is the batches' noise."""
    passes = times(schedule.hessian_batches, forward(sizes, pretext_gathers(sizes), asked=1))
    return passes + votes(1) + reduced(*schedule.hessian_batches * [sizes.backbone])


def alternation(sizes: Sizes, schedule: Schedule) -> Messages:
    lower = times(schedule.lower_steps, lower_step(sizes))
    return lower + times(schedule.upper_steps, upper_step(sizes, schedule)) + system(sizes, schedule)


def by_step(sizes: Sizes, schedule: Schedule) -> dict[str, Messages]:
    """All of the above by their names in tables."""
    return {
        "pretext step": pretext_step(sizes),
        "lower step": lower_step(sizes),
        "product with A": product(sizes, schedule),
        "upper step": upper_step(sizes, schedule),
        "alternation": alternation(sizes, schedule),
    }
