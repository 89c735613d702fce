"""Hessian products through every layer of torch.nn with parameters, and every parametrization, by each exact provider.

    python benchmarks/layers/run.py --threads 1 --json benchmarks/results/layers.json --docs docs/layers.md

In float64 on the CPU. A layer's outputs, scaled by an upper variable, go through a smooth loss; the product with the
Hessian and the cross term are compared with central differences of the provider's own gradients along the
same random direction, in each mode of the module in which it differs. What is not right to 1e-6 must have said so.
`--quick` takes every tenth case.
"""

import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor, nn

from benchmarks import measuring
from benchmarks.layers.cases import Case, cases
from benchmarks.layers.torch_names import NOT_LAYERS
from benchmarks.pages import conditions, number, table, update
from bilevel import Params, Problem, functional_call, linearize, tree
from bilevel.hypergradients import System
from bilevel.products import ForwardOverReverse, HVPProvider, MicroBatched, ReverseOverReverse

PROVIDERS: dict[str, HVPProvider] = {
    "reverse": ReverseOverReverse(),
    "reverse, kept graph": ReverseOverReverse(keep_graph=True),
    "forward": ForwardOverReverse(),
    "micro-batched": MicroBatched(4),
}
RIGHT = 1e-6
STEP = 1e-5
Figures = dict[str, Any]


class Fit(Problem):
    """A module's outputs, one row per sample, under a smooth loss; the upper variable scales them."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def lower_outputs(self, upper: Params, lower: Params, batch: tuple[Tensor, ...]) -> Tensor:
        outputs = functional_call(self.module, lower, batch)
        return outputs.reshape(len(outputs), -1) * upper["log_scale"].exp()

    def lower_output_loss(self, upper: Params, outputs: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        return (outputs.sin() + 0.3 * outputs).square().mean()

    def lower_objective(self, upper: Params, lower: Params, batch: tuple[Tensor, ...]) -> Tensor:
        return self.lower_output_loss(upper, self.lower_outputs(upper, lower, batch), batch)

    def upper_objective(self, upper: Params, lower: Params, batch: tuple[Tensor, ...]) -> Tensor:
        return self.lower_objective(upper, lower, batch)


def prepared(case: Case, mode: str) -> nn.Module:
    """The module with random parameters, after one training pass."""
    torch.manual_seed(0)
    module = case.make().double().train()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.7)
    # Embeddings with max_norm write to their weight here.
    module(*case.batch)
    return module.train(mode == "train")


@dataclass(frozen=True)
class Point:
    """A problem, its variables, and a direction of length 1 along the lower ones."""

    problem: Fit
    batch: tuple[Tensor, ...]
    upper: Params
    lower: Params
    along: Params

    @staticmethod
    def of(case: Case, mode: str) -> "Point":
        module = prepared(case, mode)
        lower = {name: leaf.detach().clone() for name, leaf in module.named_parameters()}
        along = {name: torch.randn_like(leaf) for name, leaf in lower.items()}
        for name, row in case.fixed.items():
            along[name][row] = 0.0
        along = tree.scale(1.0 / float(tree.norm(along)), along)
        return Point(Fit(module), case.batch, {"log_scale": torch.full((), 0.1, dtype=torch.float64)}, lower, along)

    def system(self, provider: HVPProvider, upper_step: float = 0.0, lower_step: float = 0.0) -> System:
        """At the point or beside it, with the same random masks."""
        torch.manual_seed(1)
        upper = {"log_scale": self.upper["log_scale"] + upper_step}
        lower = tree.axpy(lower_step, self.along, self.lower)
        return linearize(self.problem, upper, lower, [self.batch], hvp=provider)

    def differences(self, provider: HVPProvider) -> tuple[Params, Params]:
        """d(dL/dy) along the direction, and along the upper variable."""

        def central(**steps: float) -> Params:
            ahead, behind = (self.system(provider, **{k: sign * h for k, h in steps.items()}) for sign in (1.0, -1.0))
            return tree.scale(0.5 / STEP, tree.sub(ahead.gradient(), behind.gradient()))

        return central(lower_step=STEP), central(upper_step=STEP)

    def error(self, provider: HVPProvider, moved: Params, turned: Params) -> float:
        """Relative distance of a product and a cross term from these differences, the larger one."""
        here = self.system(provider)
        product, cross = here.operator(self.along), here.cross(self.along)["log_scale"]
        # d/dx <dL/dy, w> is the derivative in x of a number, so that both are differences of dL/dy.
        in_cross = abs(float(cross - tree.dot(turned, self.along))) / float(tree.norm(turned))
        return max(float(tree.norm(tree.sub(product, moved)) / tree.norm(moved)), in_cross)


def examine(case: Case, mode: str) -> dict[str, Figures]:
    """Each provider's error, and what was said: the error message instead, or a warning beside it."""
    found: dict[str, Figures] = {}
    with warnings.catch_warnings():
        # Of torch, about its older functions.
        warnings.simplefilter("ignore", FutureWarning)
        point, plain = Point.of(case, mode), None
        for name, provider in PROVIDERS.items():
            with warnings.catch_warnings(record=True) as said:
                # Also where warnings are errors.
                warnings.simplefilter("always", UserWarning)
                try:
                    # A kept graph's gradients are those of the graph that is not kept.
                    plain = plain if plain and "kept" in name else point.differences(provider)
                    found[name] = {"error": point.error(provider, *plain)}
                except (TypeError, ValueError, RuntimeError) as refusal:
                    found[name] = {"refused": str(refusal).splitlines()[0]}
            if said and "error" in found[name]:
                found[name]["flagged"] = str(said[0].message)
    return found


def silently_wrong(figures: Figures) -> list[str]:
    """Entries that are neither right nor refused nor flagged."""
    return [
        f"{row['layer']}, {row['mode']} mode, {name}: {found['error']:.1e}"
        for row in figures["layers"]
        for name, found in row["providers"].items()
        if not ("refused" in found or "flagged" in found or found["error"] <= RIGHT)
    ]


def measure(chosen: Sequence[Case]) -> Figures:
    rows = [
        {"layer": case.title, "mode": mode, "providers": examine(case, mode)} for case in chosen for mode in case.modes
    ]
    return {"environment": measuring.environment(), "left_out": NOT_LAYERS, "layers": rows}


def tables(figures: Figures) -> dict[str, str]:
    """The table of errors, what was said where there is none, and what is left out."""
    said: list[str] = []

    def cell(found: Figures) -> str:
        text = found.get("refused") or found.get("flagged")
        shown = "refused" if "refused" in found else number(found["error"])
        if not text:
            return shown
        if text not in said:
            said.append(text)
        return f"{shown} ({said.index(text) + 1})"

    rows = [
        [f"`{row['layer']}`", row["mode"], *(cell(found) for found in row["providers"].values())]
        for row in figures["layers"]
    ]
    messages = "\n".join(
        f"{i}. {text.replace('<', '&lt;').replace('*', chr(92) + '*')}" for i, text in enumerate(said, 1)
    )
    left_out = table(["class", "why"], [[f"`{name}`", why] for name, why in figures["left_out"].items()])
    return {
        "layers": f"{table(['layer', 'mode', *PROVIDERS], rows)}\n\n{conditions(figures)}",
        "messages": messages,
        "left-out": left_out,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = measuring.parser(__doc__)
    options.add_argument("--from", dest="source", type=Path, help="take the figures from here instead of measuring")
    options.add_argument("--docs", type=Path, help="put the tables between the markers of this page")
    options.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the page differs")
    given = options.parse_args(arguments)
    if given.check and not given.docs:
        options.error("--check needs --docs")
    if given.device.type != "cpu":
        options.error("--device: the table is one of the CPU's operations")
    measuring.use_threads(given.threads)
    if given.source:
        figures = json.loads(given.source.read_text(encoding="utf-8"))
    else:
        figures = {"quick": given.quick, **measure(cases()[:: 10 if given.quick else 1])}
    measuring.write_json(given.json, figures)
    texts = tables(figures)
    print("\n\n".join(texts.values()))
    wrong = silently_wrong(figures)
    if wrong:
        print("silently wrong:", *wrong, sep="\n", file=sys.stderr)
    return int(bool(wrong)) or (update(given.docs, texts, check=given.check) if given.docs else 0)


if __name__ == "__main__":
    raise SystemExit(main())
