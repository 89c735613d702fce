"""What all processes (ranks) of one run must have alike, checked before anything is computed."""

import hashlib
import json

import torch

from bilevel.distributed import on_first_rank, world_size
from recipes.bissl.config import Config, ConfigError, differences
from recipes.bissl.context import Datasets
from recipes.bissl.imagesets import DataError, ImageSet

OWN = {"data.root", "data.download"}
"""Fields that may differ: where each machine has its files."""
_SAMPLE = 64


def check_ranks(config: Config) -> None:
    """Refuse what several processes cannot do, and other configurations than rank 0's.

    Raises:
        ConfigError: naming the fields.
    """
    if world_size() == 1:
        return
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
    own = config.model_dump_json()
    others = differences(json.loads(on_first_rank(lambda: own)), json.loads(own))
    wrong = [line for line in others if line.partition(":")[0] not in OWN]
    if wrong:
        raise ConfigError("this rank has another configuration than rank 0:\n  " + "\n  ".join(wrong))


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
    digest = hashlib.sha256(repr((count, tuple(images.images.shape), images.classes)).encode())
    digest.update(images.images[places].cpu().contiguous().numpy().tobytes())
    if images.labels is not None:
        digest.update(images.labels.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
