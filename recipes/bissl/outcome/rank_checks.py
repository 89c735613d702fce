"""What all processes (ranks) of one run must have alike, checked before anything is computed."""

import hashlib
from typing import Any

import torch

from bilevel.distributed import on_first_rank, world_size

from ...experiment.errors import ConfigError
from ...experiment.ranks.agreement import check_same
from ...vision.errors import DataError
from ...vision.imagesets import ImageSet
from ...vision.record.contents import pixel_digest
from ..settings.config import Config
from ..training.datasets import Datasets

OWN = {"data": {"root", "download"}}
"""Fields that may differ: where each machine has its files."""
_SAMPLE = 64


def check_ranks(config: Config, device: torch.device) -> None:
    """Refuse what several processes cannot do, and configurations or ways to compute that are not rank 0's.

    What every rank works out for itself, such as inner products of a solver's vectors, must come out the same.

    Raises:
        ConfigError: naming the fields.
    """
    if world_size() == 1:
        return
    if config.jobs not in ("auto", 1):
        raise ConfigError(
            f"jobs: {config.jobs} processes side by side belong to a run of one process, but {world_size()} were "
            "started; set it to 1 or auto"
        )
    if config.compute.compile:
        raise ConfigError("compute.compile: losses that exchange embeddings cannot be compiled; set it to false")
    if config.compute.micro_batch is not None and config.compute.batch_norm == "synchronised":
        raise ConfigError(
            "compute.micro_batch: BatchNorm takes each chunk's statistics there, which cannot be synchronised; set "
            "compute.batch_norm to local, or compute.micro_batch to null"
        )
    for arm in config.arms:
        if config.for_arm(arm).bissl.hvp == "forward":
            raise ConfigError(
                "bissl.hvp: forward-mode products cannot see through exchanges between processes; set it to reverse"
            )
    check_same(config.model_dump(mode="json", exclude=OWN), "has another configuration than rank 0")
    check_same(_computing(device), "computes otherwise; use machines and installations of one kind, and give --threads")


def _computing(device: torch.device) -> dict[str, Any]:
    """What decides how sums are rounded."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"torch": str(torch.__version__), "threads": torch.get_num_threads(), "device": device.type, "GPU": gpu}


def check_data(data: Datasets) -> None:
    """Compare the data that this rank has read with rank 0's, by their sizes, labels and a sample of the images.

    Raises:
        DataError: they differ.
    """
    if world_size() == 1:
        return
    sets = data.downstream
    parts = {"pretext": data.pretext, "train": sets.train, "val": sets.val, "test": sets.test}
    own = {name: _fingerprint(part) for name, part in parts.items()}
    first = on_first_rank(lambda: own)
    wrong = [name for name in own if own[name] != first[name]]
    if wrong:
        raise DataError(
            f"this rank has read other images or labels than rank 0 ({', '.join(wrong)}); give every machine the same "
            "files, at data.root or where the source says"
        )


def _fingerprint(images: ImageSet) -> str:
    count = len(images)
    places = torch.arange(0, count, max(1, count // _SAMPLE))
    digest = hashlib.sha256(repr((count, images.classes)).encode())
    for item in images.images.items(places.tolist()):
        digest.update(pixel_digest(item.picture()))
    if images.labels is not None:
        digest.update(images.labels.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
