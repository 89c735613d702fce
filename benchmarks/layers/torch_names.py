"""What torch has that the table must cover, found by looking."""

import inspect
import warnings

from torch import nn
from torch.nn.utils import parametrizations, prune

NOT_LAYERS = {
    "Module": "the base of all",
    "Container": "a base without anything of its own",
    "Sequential": "holds other layers",
    "ModuleList": "holds other layers",
    "ModuleDict": "holds other layers",
    "ParameterList": "holds parameters and computes nothing",
    "ParameterDict": "holds parameters and computes nothing",
    "DataParallel": "holds another module",
    "RNNBase": "the base of RNN, LSTM and GRU",
    "RNNCellBase": "the base of the cells",
}
"""Classes of torch.nn that the table leaves out though they may have parameters."""

_ARGUMENTS = ((), (1,), (1, 1), (2, 1), (1, 1, 1), (1, (1, 1)))


def with_parameters() -> list[str]:
    """Names of the classes of torch.nn that have, or may have, parameters, `NOT_LAYERS` left out."""
    public = {
        name: value for name, value in vars(nn).items() if inspect.isclass(value) and issubclass(value, nn.Module)
    }
    return sorted(name for name, kind in public.items() if name not in NOT_LAYERS and _may_have_parameters(kind))


def weight_functions() -> list[str]:
    """Names of torch's functions that make a layer's weight from other parameters or masks."""
    new = [name for name, f in vars(parametrizations).items() if _defined_in(f, parametrizations)]
    masks = [name for name, f in vars(prune).items() if _defined_in(f, prune) and name not in ("remove", "is_pruned")]
    older = [name for name in vars(nn.utils) if hasattr(nn.utils, f"remove_{name}")]
    groups = {"parametrizations": new, "utils": older, "prune": masks}
    return sorted(f"{prefix}.{name}" for prefix, names in groups.items() for name in names if not name.startswith("_"))


def _defined_in(value: object, module: object) -> bool:
    return inspect.isfunction(value) and inspect.getmodule(value) is module


def _may_have_parameters(kind: type[nn.Module]) -> bool:
    """Unless one can be made, has none, and no class that it comes from makes any."""
    bases = [base for base in kind.__mro__ if issubclass(base, nn.Module) and base is not nn.Module]
    if any("Parameter(" in inspect.getsource(base) for base in bases):
        return True
    for arguments in _ARGUMENTS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = kind(*arguments)
        except (TypeError, ValueError, RuntimeError):
            continue
        return any(True for _ in made.parameters())
    return True
