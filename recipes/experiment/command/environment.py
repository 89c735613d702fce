"""What a run was made on: versions, processors, processes, threads."""

import os
import platform
from importlib.metadata import version

import torch

from bilevel.distributed import world_size


def environment(device: torch.device | str = "cpu") -> dict[str, str | int | None]:
    """What the run was made with: versions, processors, processes, threads; nothing that tells the machine or its user.

    Args:
        device: The device that the run used.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "cuda": torch.version.cuda if on_gpu else None,
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
