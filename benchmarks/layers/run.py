"""Hessian products through every layer of torch.nn with parameters, and every parametrization, by each exact provider.

    python benchmarks/layers/run.py --threads 1 --json benchmarks/results/layers.json --docs docs/layers.md

In float64 on the CPU. A layer's outputs, scaled by an upper variable, go through a smooth loss; the product with the
Hessian and the cross term are compared with extrapolated central differences of the provider's own gradients along the
same random direction, in each mode of the module in which it differs. What is not right to 1e-6 must have said so.
`--quick` takes every tenth case.
"""

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    # As a script: the repository's root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor, nn

from benchmarks import measuring
from benchmarks.layers.cases import NOT_LAYERS, Case, cases
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
STEP = 1e-4
Figures = dict[str, Any]


class Fit(Problem):
    """A module's outputs, one row per sample, under a smooth loss; the upper variable scales them."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def lower_outputs(self, upper: Params, lower: Params, batch: tuple[Tensor, ...]) -> Tensor:
        outputs = functional_call(self.module, lower, batch)
        return outputs.reshape(len(outputs), -1) * upper["log_scale"].exp()

    def lower_output_loss(self, outputs: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        return (outputs.sin() + 0.3 * outputs).square().mean()

    def lower_objective(self, upper: Params, lower: Params, batch: tuple[Tensor, ...]) -> Tensor:
        return self.lower_output_loss(self.lower_outputs(upper, lower, batch), batch)

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


def error_of(case: Case, mode: str, provider: HVPProvider) -> float:
    """Relative distance of a product and a cross term from differences of gradients, the larger one."""
    problem = Fit(prepared(case, mode))
    lower = {name: leaf.detach().clone() for name, leaf in problem.module.named_parameters()}
    upper = {"log_scale": torch.full((), 0.1, dtype=torch.float64)}

    def system(upper: Params, lower: Params) -> System:
        # The same random masks at every point.
        torch.manual_seed(1)
        return linearize(problem, upper, lower, [case.batch], hvp=provider)

    along = {name: torch.randn_like(leaf) for name, leaf in lower.items()}
    for name, row in case.fixed.items():
        along[name][row] = 0.0
    along = tree.scale(1.0 / float(tree.norm(along)), along)
    here = system(upper, lower)
    hessian = here.operator(along)
    # d/dx <dL/dy, w> is the derivative in x of a number, so that both are differences of dL/dy.
    cross = here.cross(along)["log_scale"]
    moved = extrapolated(lambda h: system(upper, tree.axpy(h, along, lower)).gradient())
    turned = extrapolated(lambda h: system({"log_scale": upper["log_scale"] + h}, lower).gradient())
    in_cross = abs(float(cross - tree.dot(turned, along))) / float(tree.norm(turned))
    return max(float(tree.norm(tree.sub(hessian, moved)) / tree.norm(moved)), in_cross)


def extrapolated(gradient: Callable[[float], Params]) -> Params:
    """The derivative of a gradient at 0, to the fourth order of the step."""

    def central(h: float) -> Params:
        return tree.scale(0.5 / h, tree.sub(gradient(h), gradient(-h)))

    fine = central(STEP)
    return tree.axpy(1.0 / 3.0, tree.sub(fine, central(2.0 * STEP)), fine)


def examine(case: Case, mode: str, provider: HVPProvider) -> Figures:
    """The error, and what was said: the error message instead, or a warning beside it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("ignore", FutureWarning)
        try:
            error = error_of(case, mode, provider)
        except (TypeError, ValueError, RuntimeError) as refusal:
            return {"refused": " ".join(str(refusal).split())}
    return {"error": error, **({"flagged": str(said[0].message)} if said else {})}


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
        {
            "layer": case.title,
            "mode": mode,
            "providers": {name: examine(case, mode, provider) for name, provider in PROVIDERS.items()},
        }
        for case in chosen
        for mode in case.modes
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
    messages = "\n".join(f"{i}. {text.replace('<', '&lt;').replace('*', chr(92) + '*')}" for i, text in enumerate(said, 1))
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
