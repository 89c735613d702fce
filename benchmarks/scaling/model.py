"""What BiSSL's schedule takes on so many GPUs, and what limits it, from a few rates: counts, no measurement."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import ceil, inf
from typing import Any

from benchmarks.communication import model as communication
from benchmarks.communication.model import Messages, Sizes, reduced, sent


@dataclass(frozen=True)
class Schedule:
    """The paper's full schedule; `pretext_steps` are those of the baseline, `warm_up_steps` those before BiSSL."""

    pretext_steps: int = 600 * 98
    warm_up_steps: int = 500 * 98
    alternations: int = 500
    lower_steps: int = 20
    upper_steps: int = 8
    hessian_batches: int = 5
    fine_tuning_epochs: int = 400


@dataclass(frozen=True)
class Machine:
    """Assumptions about the hardware, and what was measured.

    Attributes:
        rate: images a second of one GPU for a pretext step, an image being both of its views.
        bandwidth: bytes a second at which one GPU sends.
        latency: seconds that a collective takes however small it is.
        product_cost: time of a Hessian-vector product in gradients over the same batch.
        augmentation: time in which an image's views are finished on the device, in gradients over that image.
        cores: that load for one GPU.
        loading: images a second of one such core; infinite where the images lie on the device.
        memory: bytes of one GPU.
        flops: of a gradient over one image, both views.
        step_bytes, product_bytes: memory that a gradient and a product take for each image of a batch.
        vectors: of the lower level's length, that live at the peak of an upper step, variables and momenta included.
    """

    rate: float = 15_000.0
    bandwidth: float = 50e9
    latency: float = 20e-6
    product_cost: float = 4.0
    augmentation: float = 0.0
    cores: float = 12.0
    loading: float = inf
    memory: float = 80e9
    flops: float = 4e9
    step_bytes: float = 0.0
    product_bytes: float = 0.0
    vectors: float = 22.0


@dataclass(frozen=True)
class Seconds:
    """Where the time of one GPU goes. All but `loading` follow one another; it runs beside them.

    Attributes:
        compute: gradients and products on the GPU's own rows.
        augmentation: of views.
        reduction: means of gradients and products over the GPUs.
        statistics: exchanges of synchronised BatchNorm.
        contrastive: exchanges of outputs, and the loss over the whole batch, which every GPU computes for itself.
        loading: reading, decoding and cropping, by the cores.
    """

    compute: float = 0.0
    augmentation: float = 0.0
    reduction: float = 0.0
    statistics: float = 0.0
    contrastive: float = 0.0
    loading: float = 0.0

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, count: float) -> "Seconds":
        return Seconds(*(count * getattr(self, f.name) for f in fields(self)))

    @property
    def busy(self) -> float:
        """All but loading."""
        return sum(getattr(self, f.name) for f in fields(self)) - self.loading

    @property
    def total(self) -> float:
        """Loading is hidden as far as the rest takes as long."""
        return max(self.busy, self.loading)

    @property
    def limit(self) -> str:
        """What takes longest of all that is waited for."""
        if self.loading > self.busy:
            return "loading"
        return max((f.name for f in fields(self) if f.name != "loading"), key=lambda name: getattr(self, name))


def exchanged(step: Callable[[Sizes], Messages], sizes: Sizes, machine: Machine, means: Messages) -> Seconds:
    """The exchanges of a step, in ring algorithms: `means` of parameters, BatchNorm's, and the others."""
    if sizes.ranks == 1:
        return Seconds()
    everything = step(sizes)
    local = step(replace(sizes, backbone_norms=(), head_norms=()))

    def seconds(messages: Messages) -> float:
        return messages.total() * machine.latency + sent(messages, sizes.ranks) / machine.bandwidth

    return Seconds(reduction=seconds(means), statistics=seconds(everything - local), contrastive=seconds(local - means))


def repeated_loss(sizes: Sizes, machine: Machine) -> float:
    """Seconds of a gradient's loss over all pairs of rows beyond a GPU's own share, which is in its rate: three times
    the products of every row's embedding with every other's."""
    rows, width = sizes.views * sizes.batch, sizes.embedding / sizes.views
    return (1.0 - 1.0 / sizes.ranks) * 3.0 * 2.0 * rows**2 * width / (machine.flops * machine.rate)


def gradient(sizes: Sizes, machine: Machine) -> Seconds:
    """A pretext or lower step."""
    own = sizes.batch / sizes.ranks
    computed = Seconds(
        compute=own / machine.rate,
        augmentation=machine.augmentation * own / machine.rate,
        contrastive=repeated_loss(sizes, machine),
        loading=own / (machine.cores * machine.loading),
    )
    means = reduced(sizes.backbone + sizes.heads + 1)
    return computed + exchanged(communication.pretext_step, sizes, machine, means)


def product(sizes: Sizes, machine: Machine, batches: int) -> Seconds:
    """A product with A, on stored views: `product_cost` gradients on each of the batches, and one mean of all."""
    cost = batches * machine.product_cost
    computed = Seconds(
        compute=cost * sizes.batch / (sizes.ranks * machine.rate), contrastive=cost * repeated_loss(sizes, machine)
    )
    schedule = communication.Schedule(hessian_batches=batches)
    return computed + exchanged(lambda s: communication.product(s, schedule), sizes, machine, reduced(sizes.backbone))


def upper(sizes: Sizes, machine: Machine) -> Seconds:
    """An upper step without its solve: the downstream loss at theta_P and at theta_D, one view each."""
    own = sizes.labelled / sizes.ranks
    computed = Seconds(
        compute=own / machine.rate,
        augmentation=0.5 * machine.augmentation * own / machine.rate,
        loading=own / (machine.cores * machine.loading),
    )
    alone = communication.Schedule(iterations=0, layerwise=False)
    means = reduced(1 + 2 * sizes.backbone + sizes.head)
    return computed + exchanged(lambda s: communication.upper_step(s, alone), sizes, machine, means)


def alternation(schedule: Schedule, sizes: Sizes, machine: Machine, products: float, batches: int) -> Seconds:
    r"""``N_L g + m p + N_U u``, and what makes the system: a pass of each of its batches, a third of a gradient."""
    made = Seconds()
    if products:
        made = Seconds(compute=batches * sizes.batch / (3.0 * sizes.ranks * machine.rate)) + exchanged(
            lambda s: communication.system(s, communication.Schedule(hessian_batches=batches)),
            sizes,
            machine,
            reduced(*batches * [sizes.backbone]),
        )
    lower = gradient(sizes, machine) * schedule.lower_steps
    return lower + product(sizes, machine, batches) * products + upper(sizes, machine) * schedule.upper_steps + made


def fine_tuning(schedule: Schedule, sizes: Sizes, machine: Machine, images: int) -> Seconds:
    """All epochs over labelled images, one view each, half of an image of the pretext step."""
    own = images / sizes.ranks
    epoch = Seconds(
        compute=0.5 * own / machine.rate,
        augmentation=0.5 * machine.augmentation * own / machine.rate,
        loading=own / (machine.cores * machine.loading),
    )
    means = reduced(sizes.backbone + sizes.head + 1)
    step = exchanged(lambda s: means, sizes, machine, means)
    return (epoch + step * ceil(images / sizes.labelled)) * schedule.fine_tuning_epochs


def validation(schedule: Schedule, sizes: Sizes, machine: Machine, images: int) -> Seconds:
    """After every epoch of fine-tuning: a forward pass, a third of a gradient, over one view of each image."""
    own = images / sizes.ranks
    epoch = Seconds(compute=own / (6.0 * machine.rate), loading=own / (machine.cores * machine.loading))
    return epoch * schedule.fine_tuning_epochs


def held(sizes: Sizes, machine: Machine, *, products: float) -> float:
    """Bytes of a GPU at the peak: vectors as long as the lower level, and the largest pass over its rows."""
    rows = sizes.batch / sizes.ranks
    if not products:
        # y, x and a momentum of each, a gradient, and the upper level's.
        return 4.0 * 8.0 * (sizes.backbone + sizes.heads) + rows * machine.step_bytes
    return 4.0 * machine.vectors * (sizes.backbone + sizes.heads) + rows * max(
        machine.step_bytes, machine.product_bytes
    )


def plans(schedule: Schedule, default: float, two_batches: float) -> dict[str, tuple[float, int]]:
    """Products with A in one alternation, and the Hessian batches of A, by setting; those of the settings that solve
    once an alternation were counted."""
    k = schedule.hessian_batches
    return {
        "as published: 5 iterations for each upper step": (5 * schedule.upper_steps, k),
        "one product for each upper step (recycling)": (schedule.upper_steps, k),
        f"one solve an alternation, to the noise (the default): {default:g} products": (default, k),
        f"the same with two Hessian batches: {two_batches:g} products": (two_batches, 2),
        "no product (identity)": (0, k),
    }


def predict(
    schedule: Schedule, sizes: Sizes, machine: Machine, counted: Mapping[str, float], gpus: Sequence[int]
) -> list[dict[str, Any]]:
    """Hours of the pretext stage alone, of BiSSL's stage and of both BiSSL stages, what limits the first two, and GB of
    a GPU, for each plan and number of GPUs."""
    rows: list[dict[str, Any]] = []
    for name, (products, batches) in plans(schedule, counted["default"], counted["two_batches"]).items():
        for count in gpus:
            here = replace(sizes, ranks=count)
            step = gradient(here, machine)
            stage = alternation(schedule, here, machine, products, batches) * schedule.alternations
            memory = held(here, machine, products=products)
            rows.append(
                {
                    "plan": name,
                    "gpus": count,
                    "baseline_hours": schedule.pretext_steps * step.total / 3600.0,
                    "stage_hours": stage.total / 3600.0,
                    "total_hours": (schedule.warm_up_steps * step.total + stage.total) / 3600.0,
                    "stage_over_plain": stage.total / (schedule.alternations * schedule.lower_steps * step.total),
                    "baseline_limit": step.limit,
                    "stage_limit": "memory" if memory > machine.memory else stage.limit,
                    "gigabytes": memory / 1e9,
                }
            )
    return rows


ON_THE_DEVICE = "on the device (`compute.crops float`)"

SETS = {"flowers": (1_020, 1_020), "cifar10": (40_000, 10_000), "food101": (60_600, 15_150)}
"""Training and validation images of some sets."""


def everything(assumed: Mapping[str, Any], gpus: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """All that is predicted, from assumptions as a JSON file holds them."""
    schedule, machine, counted = Schedule(), Machine(**assumed["machine"]), assumed["products"]
    lists = {name: tuple(assumed["sizes"][name]) for name in ("backbone_norms", "head_norms")}
    sizes = Sizes(**{**assumed["sizes"], **lists})
    ways = {**assumed["ways"], ON_THE_DEVICE: inf}
    return {
        "prediction": predict(schedule, sizes, machine, counted, gpus),
        "shares": shares(schedule, sizes, machine, counted["default"], gpus),
        "loading": loading(schedule, sizes, machine, ways, gpus),
        "after": after(schedule, sizes, machine, SETS, gpus[:2]),
    }


def shares(
    schedule: Schedule, sizes: Sizes, machine: Machine, default: float, gpus: Sequence[int]
) -> list[dict[str, Any]]:
    """Where the time of a pretext step and of the default's alternation goes, in milliseconds."""
    rows: list[dict[str, Any]] = []
    for count in gpus:
        here = replace(sizes, ranks=count)
        of = {
            "pretext step": gradient(here, machine),
            "alternation, default": alternation(schedule, here, machine, default, schedule.hessian_batches),
        }
        for name, seconds in of.items():
            parts = {f.name: 1e3 * getattr(seconds, f.name) for f in fields(seconds)}
            rows.append({"what": name, "gpus": count, **parts, "limit": seconds.limit})
    return rows


def loading(
    schedule: Schedule, sizes: Sizes, machine: Machine, ways: Mapping[str, float], gpus: Sequence[int]
) -> list[dict[str, Any]]:
    """For each way to load, by its images a second and core: cores that a GPU needs to be kept busy, and hours of the
    pretext stage with `machine.cores`."""
    rows: list[dict[str, Any]] = []
    for way, rate in ways.items():
        for count in gpus:
            here = replace(sizes, ranks=count)
            step = gradient(here, replace(machine, loading=rate))
            rows.append(
                {
                    "way": way,
                    "gpus": count,
                    "cores": here.batch / count / (step.busy * rate),
                    "hours": schedule.pretext_steps * step.total / 3600.0,
                    "limit": step.limit,
                }
            )
    return rows


def after(
    schedule: Schedule, sizes: Sizes, machine: Machine, sets: Mapping[str, tuple[int, int]], gpus: Sequence[int]
) -> list[dict[str, Any]]:
    """Minutes of fine-tuning and of its validation, for sets of so many training and validation images."""
    rows: list[dict[str, Any]] = []
    for name, (train, val) in sets.items():
        for count in gpus:
            here = replace(sizes, ranks=count)
            tuned, validated = fine_tuning(schedule, here, machine, train), validation(schedule, here, machine, val)
            minutes = {"fine_tuning": tuned.total / 60.0, "validation": validated.total / 60.0}
            rows.append({"set": name, "images": [train, val], "gpus": count, **minutes, "limit": tuned.limit})
    return rows
