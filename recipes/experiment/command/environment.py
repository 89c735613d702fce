"""What a run was made on: versions, processors, processes, threads."""

import os
import platform
from collections.abc import Iterable
from importlib.metadata import version

import torch

from bilevel.distributed import world_size

from ..errors import ConfigError


def find_device(name: str) -> torch.device:
    """The device that a field `device` asks for: "cpu", "cuda", or "auto", which is CUDA where there is one.

    Raises:
        ConfigError: torch does not see it.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for, but torch sees no CUDA device; use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def environment(device: torch.device | str = "cpu", packages: Iterable[str] = ()) -> dict[str, str | int | None]:
    """What the run was made with: versions, processors, processes, threads; nothing that tells the machine or its user.

    Args:
        device: the device that the run used.
        packages: of which the version counts beside torch's.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in packages},
        "cuda": torch.version.cuda if on_gpu else None,
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
