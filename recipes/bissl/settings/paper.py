"""The numbers of both versions of the paper: learning rates, weight decays (Tables 2 to 4) and scores (Table 1)."""

from dataclasses import dataclass
from typing import Literal

PaperVersion = Literal["v2", "v1"]

Rates = tuple[float, float]
"""(learning rate, weight decay)."""

Score = tuple[float, float]
"""(mean, standard deviation) over ten fine-tunings, in percent."""


@dataclass(frozen=True)
class PaperEntry:
    """What one version of the paper states for one data set.

    Attributes:
        title: the paper's name of the set.
        baseline, upper, bissl: rates of fine-tuning after plain pre-training (Table 2), of the head warm-up and the
            upper level (Table 3), and of fine-tuning after BiSSL (Table 4).
        scores: metric -> (BiSSL's score, the baseline's), the primary metric first (Table 1).
    """

    title: str
    baseline: Rates
    upper: Rates
    bissl: Rates
    scores: dict[str, tuple[Score, Score]]


TITLES = {
    "stl10": "STL10L",
    "flowers": "Flowers",
    "cars": "Cars",
    "aircraft": "Aircrafts",
    "dtd": "DTD",
    "pets": "Pets",
    "fashion-mnist": "FMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "caltech101": "Caltech-101",
    "food101": "Food",
    "sun397": "SUN397",
    "cub200": "CUB200",
    "voc2007": "VOC07",
}
"""The fourteen downstream sets in the order of Table 1: name -> the paper's name."""

_BASELINE: dict[str, Rates] = {
    "stl10": (0.0136, 0.001),
    "flowers": (0.113, 0.00226),
    "cars": (0.035, 0.00658),
    "aircraft": (0.0167, 0.00996),
    "dtd": (0.0262, 0.00332),
    "pets": (0.0235, 0.00472),
    "fashion-mnist": (0.0009, 0.00829),
    "cifar10": (0.0067, 0.00128),
    "cifar100": (0.005, 0.00127),
    "caltech101": (0.0096, 0.00902),
    "food101": (0.015, 0.00699),
    "sun397": (0.0097, 0.00121),
    "cub200": (0.0722, 0.00568),
    "voc2007": (0.0108, 0.00894),
}

_UPPER_V2: dict[str, Rates] = {
    "stl10": (0.015, 0.01),
    "flowers": (0.05, 0.01),
    "cars": (0.035, 0.007),
    "aircraft": (0.015, 0.01),
    "dtd": (0.015, 0.0075),
    "pets": (0.03, 0.005),
    "fashion-mnist": (0.05, 0.004),
    "cifar10": (0.03, 0.006),
    "cifar100": (0.03, 0.001),
    "caltech101": (0.03, 0.007),
    "food101": (0.015, 0.01),
    "sun397": (0.03, 0.002),
    "cub200": (0.05, 0.005),
    "voc2007": (0.03, 0.006),
}

_UPPER: dict[PaperVersion, dict[str, Rates]] = {
    "v2": _UPPER_V2,
    "v1": {**_UPPER_V2, "fashion-mnist": (0.05, 0.005), "food101": (0.006, 0.01)},
}

_BISSL: dict[PaperVersion, dict[str, Rates]] = {
    "v2": {
        "stl10": (0.0005, 0.00043),
        "flowers": (0.0009, 0.00005),
        "cars": (0.0293, 0.00851),
        "aircraft": (0.011, 0.00612),
        "dtd": (0.0008, 0.00764),
        "pets": (0.0002, 0.00543),
        "fashion-mnist": (0.0022, 0.00876),
        "cifar10": (0.0003, 0.00991),
        "cifar100": (0.0012, 0.00422),
        "caltech101": (0.0008, 0.00011),
        "food101": (0.006, 0.0095),
        "sun397": (0.0011, 0.00028),
        "cub200": (0.035, 0.00868),
        "voc2007": (0.0002, 0.00015),
    },
    "v1": {
        "stl10": (0.0008, 0.00641),
        "flowers": (0.0007, 0.00078),
        "cars": (0.028, 0.00453),
        "aircraft": (0.0126, 0.00459),
        "dtd": (0.005, 0.00003),
        "pets": (0.0011, 0.00852),
        "fashion-mnist": (0.0031, 0.00983),
        "cifar10": (0.0007, 0.00611),
        "cifar100": (0.0013, 0.00322),
        "caltech101": (0.0004, 0.00013),
        "food101": (0.0202, 0.00697),
        "sun397": (0.0015, 0.00298),
        "cub200": (0.0003, 0.00495),
        "voc2007": (0.0004, 0.00003),
    },
}

# Table 1 by metric: BiSSL in v2, BiSSL in v1, and the baseline, which both versions share.
_SCORES: dict[str, dict[str, tuple[Score, Score, Score]]] = {
    "stl10": {"top1": ((90.2, 0.1), (90.6, 0.1), (90.3, 0.1)), "top5": ((99.7, 0.0), (99.7, 0.0), (99.6, 0.0))},
    "flowers": {"top1": ((74.8, 0.2), (74.8, 0.4), (73.4, 0.4)), "top5": ((89.8, 0.3), (90.0, 0.3), (90.0, 0.4))},
    "cars": {"top1": ((73.0, 0.4), (72.4, 0.3), (72.7, 0.5)), "top5": ((91.5, 0.3), (91.2, 0.2), (91.4, 0.4))},
    "aircraft": {"top1": ((46.9, 0.5), (46.8, 0.8), (46.1, 0.9)), "top5": ((78.9, 0.4), (78.5, 0.6), (79.3, 0.6))},
    "dtd": {"top1": ((51.8, 0.5), (52.1, 0.5), (49.3, 0.5)), "top5": ((79.9, 0.3), (79.5, 0.3), (79.1, 0.4))},
    "pets": {"top1": ((67.8, 0.2), (67.6, 0.4), (65.0, 0.5)), "top5": ((92.3, 0.3), (91.9, 0.4), (90.7, 0.3))},
    "fashion-mnist": {
        "top1": ((94.3, 0.2), (94.3, 0.1), (94.1, 0.1)),
        "top5": ((100.0, 0.0), (100.0, 0.0), (100.0, 0.0)),
    },
    "cifar10": {"top1": ((93.9, 0.1), (93.8, 0.2), (93.8, 0.1)), "top5": ((99.9, 0.0), (99.9, 0.0), (99.8, 0.0))},
    "cifar100": {"top1": ((73.0, 0.1), (73.0, 0.2), (73.2, 0.2)), "top5": ((93.7, 0.1), (93.7, 0.1), (92.8, 0.1))},
    "caltech101": {"top1": ((80.6, 0.7), (80.7, 0.5), (78.1, 0.5)), "top5": ((95.5, 0.2), (95.3, 0.1), (94.7, 0.2))},
    "food101": {"top1": ((72.0, 0.2), (71.8, 0.2), (71.7, 0.2)), "top5": ((90.4, 0.1), (90.5, 0.1), (90.4, 0.1))},
    "sun397": {"top1": ((41.1, 0.2), (41.0, 0.3), (40.0, 0.3)), "top5": ((71.0, 0.2), (71.0, 0.4), (69.9, 0.4))},
    "cub200": {"top1": ((47.1, 0.4), (45.6, 0.3), (45.7, 0.4)), "top5": ((72.1, 0.3), (75.2, 0.2), (70.7, 0.6))},
    "voc2007": {"map11": ((60.4, 0.1), (60.4, 0.2), (58.6, 0.3))},
}


def paper_name(source: str) -> str:
    """A data source's name as it is spelled here, with hyphens."""
    return source.replace("_", "-")


def paper_entry(name: str, version: PaperVersion = "v2") -> PaperEntry | None:
    """The paper's numbers for the data source `name` ("fashion-mnist" or "fashion_mnist"), None for any other set."""
    name = paper_name(name)
    if name not in TITLES:
        return None
    scores = {
        metric: (first if version == "v1" else second, baseline)
        for metric, (second, first, baseline) in _SCORES[name].items()
    }
    return PaperEntry(TITLES[name], _BASELINE[name], _UPPER[version][name], _BISSL[version][name], scores)
