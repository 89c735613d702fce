"""BiSSL as a `bilevel.Problem`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bilevel import Params, Problem, functional_call, proximal
from bilevel.nn import in_curvature_pass, own_draws

from ..tasks.base import Bound, DownstreamTask, PretextTask
from .global_loss import downstream_loss, pretext_loss, pretext_output_loss

BACKBONE = "backbone."

PretextLoss = Callable[[Params, Any], Tensor]
"""L_P, or its outputs, of (lower variables, batch)."""


def _as_it_is(loss: PretextLoss) -> PretextLoss:
    return loss


def _leave(*modules: nn.Module) -> None:
    return None


@dataclass
class BiSSLProblem(Problem):
    r"""BiSSL (paper, eq. 2-3):

    .. math:: \min_{\theta_D, \phi_D} L_D(\theta_P^*(\theta_D), \phi_D) + \gamma L_D(\theta_D, \phi_D), \qquad
       \theta_P^*(\theta_D) \in \arg\min_{\theta_P} \min_{\phi_P}
       L_P(\theta_P, \phi_P) + \tfrac{\lambda}{2} \|\theta_P - \theta_D\|^2

    Upper variables: ``backbone.*`` (theta_D) and ``head.*`` (phi_D). Lower ones: ``backbone.*`` (theta_P) and
    ``heads.*`` (phi_P), of which only the backbone responds to the upper level. The two backbones are separate modules
    because each has its own running statistics: theta_P's follow the lower steps alone, theta_D's its gamma pass.

    Attributes:
        regularization_weight: lambda.
        gamma: weight of the downstream loss of theta_D itself.
        first_order: what plain steps on the lower loss evaluate it by (autocast, compilation); passes of a
            hypergradient take the loss as it is.
        join_buffers: given modules whose running statistics have moved, makes them the same on all ranks.
        implicit_head: phi_P responds to the upper level too, instead of being held fixed (the paper's eq. 6-7).
    """

    pretext: PretextTask
    downstream: DownstreamTask
    lower_backbone: nn.Module
    upper_backbone: nn.Module
    heads: nn.ModuleDict
    head: nn.Module
    regularization_weight: float = 0.001
    gamma: float = 0.01
    curvature_depends_on_upper: bool = False
    implicit_head: bool = False
    first_order: Callable[[PretextLoss], PretextLoss] = _as_it_is
    join_buffers: Callable[..., None] = _leave

    def __post_init__(self) -> None:
        self.check_curvature = not self.pretext.stops_gradients
        self._first_order_loss = self.first_order(self._pretext_loss)
        self._first_order_outputs = self.first_order(self._pretext_outputs)

    def variables(self) -> tuple[Params, Params]:
        """(upper, lower): the modules' own trainable parameters, so that optimizer steps change the modules."""
        upper = trainable(self.upper_backbone, BACKBONE) | trainable(self.head, "head.")
        return upper, lower_variables(self.lower_backbone, self.heads)

    def modules(self) -> dict[str, nn.Module]:
        """The networks, by their names in artifacts."""
        return {
            "backbone": self.lower_backbone,
            "heads": self.heads,
            "upper_backbone": self.upper_backbone,
            "head": self.head,
        }

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        loss = self._pretext_loss if in_curvature_pass() else self._first_order_loss
        return loss(lower, batch)

    def lower_outputs(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        outputs = self._pretext_outputs if in_curvature_pass() else self._first_order_outputs
        return outputs(lower, batch)

    def lower_output_loss(self, upper: Params, outputs: Tensor, batch: Any) -> Tensor:
        return pretext_output_loss(self.pretext, outputs)

    def upper_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        inputs, targets = batch
        head = bind(self.head, upper, "head.")
        through_lower = bind(self.lower_backbone, lower, BACKBONE)
        loss = downstream_loss(self.downstream, through_lower, head, inputs, targets)
        if self.gamma == 0.0:
            return loss
        direct = bind(self.upper_backbone, upper, BACKBONE)
        return loss + self.gamma * downstream_loss(self.downstream, direct, head, inputs, targets)

    def regularizer(self, upper: Params, lower: Params) -> Tensor:
        return proximal(upper, lower, {name: name for name in lower if name.startswith(BACKBONE)})

    def implicit(self, name: str) -> bool:
        return self.implicit_head or name.startswith(BACKBONE)

    def after_lower_step(self, upper: Params, lower: Params, step: int) -> None:
        self.join_buffers(self.lower_backbone, self.heads)
        self.pretext.after_step(self.lower_backbone, self.heads, step)

    @torch.no_grad()
    def after_upper_step(self, upper: Params, lower: Params, batch: Any, step: int) -> None:
        """theta_D's running statistics follow its gamma pass; a hypergradient itself writes no buffer."""
        if self.gamma != 0.0:
            with own_draws():
                self.downstream.forward(self.upper_backbone, self.head, batch[0])
            self.join_buffers(self.upper_backbone, self.head)

    def state_dict(self) -> dict[str, Any]:
        """Buffers and frozen parameters (a momentum target), which are no variables."""
        return {
            name: {key: t.detach().clone() for key, t in _fixed(module).items()}
            for name, module in self.modules().items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, module in self.modules().items():
            for key, tensor in _fixed(module).items():
                tensor.copy_(state[name][key])

    def _pretext_loss(self, lower: Params, batch: Any) -> Tensor:
        return pretext_loss(self.pretext, *bind_lower(self.lower_backbone, self.heads, lower), batch)

    def _pretext_outputs(self, lower: Params, batch: Any) -> Tensor:
        return self.pretext.outputs(*bind_lower(self.lower_backbone, self.heads, lower), batch)


def lower_variables(backbone: nn.Module, heads: nn.ModuleDict) -> Params:
    """theta_P and phi_P: the modules' own trainable parameters, named ``backbone.*`` and ``heads.*``."""
    return trainable(backbone, BACKBONE) | trainable(heads, "heads.")


def bind_lower(backbone: nn.Module, heads: nn.ModuleDict, lower: Params) -> tuple[Bound, dict[str, Bound]]:
    """Backbone and heads as a pretext task takes them, with `lower` in place of their own `lower_variables`."""
    return bind(backbone, lower, BACKBONE), {
        name: bind(module, lower, f"heads.{name}.") for name, module in heads.items()
    }


def bind(module: nn.Module, params: Params, prefix: str) -> Bound:
    """`module` as a function with the entries of `params` that carry `prefix` in place of its own parameters."""
    own = {name.removeprefix(prefix): leaf for name, leaf in params.items() if name.startswith(prefix)}

    def call(*args: Any, **kwargs: Any) -> Any:
        return functional_call(module, own, args, kwargs)

    return call


def trainable(module: nn.Module, prefix: str = "") -> Params:
    """The module's own parameters that are trained, their names after `prefix`."""
    return {prefix + name: p for name, p in module.named_parameters() if p.requires_grad}


def _fixed(module: nn.Module) -> dict[str, Tensor]:
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    return {**dict(module.named_buffers()), **frozen}
