"""The cost of BiSSL's schedule from a few rates: counts of gradients and products, no measurement."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The paper's full schedule; `pretext_steps` are those of the baseline, `warm_up_steps` those before BiSSL."""

    pretext_steps: int = 600 * 98
    warm_up_steps: int = 500 * 98
    alternations: int = 500
    lower_steps: int = 20
    upper_steps: int = 8
    iterations: int = 5
    hessian_batches: int = 5
    batch_size: int = 1024
    upper_batch_size: int = 256
    parameters: int = 11_176_512 + 263_168
    embedding: int = 256


@dataclass(frozen=True)
class Machine:
    """Assumptions about the hardware.

    Attributes:
        rate: images a second of one GPU for a pretext step, an image being both of its views.
        bandwidth: bytes a second at which one GPU sends in an all-reduce.
        product_cost: time of a Hessian-vector product in gradients over the same batch.
    """

    rate: float
    bandwidth: float
    product_cost: float


def reduction_seconds(machine: Machine, count: float, gpus: int) -> float:
    """A ring all-reduce of `count` float32 numbers: every GPU sends ``2 (n - 1) / n`` times their bytes."""
    return 2.0 * (gpus - 1) / gpus * 4.0 * count / machine.bandwidth


def gradient_seconds(schedule: Schedule, machine: Machine, gpus: int) -> float:
    """One lower gradient: the compute shared ideally, then the gradient and the embeddings of both views exchanged."""
    exchanged = schedule.parameters + 2 * schedule.batch_size * schedule.embedding
    return schedule.batch_size / (gpus * machine.rate) + reduction_seconds(machine, exchanged, gpus)


def product_seconds(schedule: Schedule, machine: Machine, gpus: int) -> float:
    """One product with A: on each of the K batches `product_cost` gradients of compute and the embeddings exchanged
    twice; the mean over batches and GPUs is one exchange of the parameters."""
    compute = machine.product_cost * schedule.batch_size / (gpus * machine.rate)
    embeddings = reduction_seconds(machine, 4 * schedule.batch_size * schedule.embedding, gpus)
    return schedule.hessian_batches * (compute + embeddings) + reduction_seconds(machine, schedule.parameters, gpus)


def alternation_seconds(schedule: Schedule, machine: Machine, gpus: int, products: int) -> float:
    r"""``N_L g + products p + N_U u``: lower steps, products each over the K batches, first-order upper passes.

    An upper step differentiates the downstream loss at theta_P and at theta_D, one view each.
    """
    upper = schedule.upper_batch_size / (gpus * machine.rate) + reduction_seconds(
        machine, 2 * schedule.parameters, gpus
    )
    solves = products * product_seconds(schedule, machine, gpus)
    return schedule.lower_steps * gradient_seconds(schedule, machine, gpus) + solves + schedule.upper_steps * upper


def plans(schedule: Schedule) -> dict[str, int]:
    """Products with the whole operator in one alternation, by setting."""
    return {
        "as published: 5 iterations for each upper step": schedule.upper_steps * schedule.iterations,
        "2 iterations for each upper step": schedule.upper_steps * 2,
        "8 products an alternation (recycling)": schedule.upper_steps,
        "no product (identity)": 0,
    }


def predict(schedule: Schedule, machine: Machine, gpus: Sequence[int]) -> list[dict[str, float | str]]:
    """Hours of the pretext stage alone, of BiSSL's stage, and of both BiSSL stages, for each number of GPUs."""
    rows: list[dict[str, float | str]] = []
    for name, products in plans(schedule).items():
        for count in gpus:
            step = gradient_seconds(schedule, machine, count)
            stage = schedule.alternations * alternation_seconds(schedule, machine, count, products)
            rows.append(
                {
                    "plan": name,
                    "products": products,
                    "gpus": count,
                    "baseline_hours": schedule.pretext_steps * step / 3600.0,
                    "stage_hours": stage / 3600.0,
                    "total_hours": (schedule.warm_up_steps * step + stage) / 3600.0,
                    "stage_over_plain": stage / (schedule.alternations * schedule.lower_steps * step),
                }
            )
    return rows
