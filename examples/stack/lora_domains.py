"""Which domains to fine-tune on: weights of domains above LoRA adapters of a transformers model.

    python examples/stack/lora_domains.py [--quick]

Three domains of token sequences: one speaks as the target does, one disagrees with it (each token is followed by
another one), one is noise. Lower level: the adapters (peft) of a frozen, randomly initialised Llama, on the domains'
losses by weight. Upper level: the loss on 16 sequences of the target, over the weights, a softmax that starts equal.
Then fresh adapters are trained by weights that stand still. Nothing is downloaded. Needs the extra `stack`.
"""

import argparse
import math
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from bilevel import CG, AlternatingSchedule, Implicit, Level, Params, Problem, Trainer, functional_call

try:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
except ModuleNotFoundError as error:
    sys.exit(f'{error.name} is not installed; the extra stack brings it: pip install ".[stack]"')

TOKENS, LENGTH, SURE = 12, 16, 0.8
DOMAINS: tuple[str, ...] = ("same", "other", "noise")


def speak(count: int, follows: Tensor | None, seed: int) -> Tensor:
    """Sequences [count, LENGTH] in which `follows` names a successor with probability SURE."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(TOKENS, (count, LENGTH), generator=generator)
    sure = torch.rand(count, LENGTH, generator=generator) < SURE
    if follows is not None:
        for place in range(1, LENGTH):
            tokens[:, place] = torch.where(sure[:, place], follows[tokens[:, place - 1]], tokens[:, place])
    return tokens


class Domains(Problem):
    def __init__(self) -> None:
        torch.manual_seed(0)
        size: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=TOKENS, initializer_range=0.2, use_cache=False, **size))
        layers = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
        self.model = get_peft_model(llama, LoraConfig(r=4, lora_alpha=8, target_modules=layers))

    def adapters(self) -> Params:
        """Fresh ones: of each pair of factors the first random, the second 0."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def losses(self, lower: Params, tokens: Tensor) -> Tensor:
        """Cross-entropy of the next token, of each sequence of tokens [n, LENGTH]."""
        logits = functional_call(self.model, lower, kwargs={"input_ids": tokens}).logits
        return cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none").mean(dim=1)

    def lower_objective(self, upper: Params, lower: Params, batch: tuple[Tensor]) -> Tensor:
        (tokens,) = batch  # [n, domains, LENGTH]
        losses = self.losses(lower, tokens.flatten(0, 1)).view(tokens.shape[:2]).mean(dim=0)
        return (upper["logits"].softmax(0) * losses).sum()

    def upper_objective(self, upper: Params, lower: Params, batch: Tensor) -> Tensor:
        return self.losses(lower, batch).mean()


def train(
    domains: Tensor, target: Tensor, logits: Tensor, alternations: int, upper_steps: int
) -> tuple[Domains, Params, Tensor]:
    """Fresh adapters, trained on the domains; each alternation is 10 lower steps and so many on the weights."""
    problem, x = Domains(), {"logits": logits.clone()}
    y = problem.adapters()
    data = DataLoader(TensorDataset(domains), 8, shuffle=True)
    upper = Level(x, torch.optim.Adam(x.values(), lr=0.2), [target])
    lower = Level(y, torch.optim.Adam(y.values(), lr=0.01), data)
    # A network's Hessian has negative eigenvalues, which the term outweighs.
    method = Implicit(CG(20, rtol="noise"), tikhonov=3.0, hessian_batches=4)
    Trainer(problem, upper, lower, AlternatingSchedule(alternations, 10, upper_steps), method).run()
    return problem, y, x["logits"].softmax(0)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 alternations instead of 25")
    alternations = 3 if parser.parse_args(arguments).quick else 25
    same, other = torch.stack([torch.randperm(TOKENS, generator=torch.Generator().manual_seed(k)) for k in (0, 1)])
    domains = torch.stack([speak(160, follows, k) for k, follows in enumerate((same, other, None))], dim=1)
    target, test = speak(16, same, 10), speak(200, same, 11)
    *_, learned = train(domains, target, torch.zeros(3), alternations, upper_steps=1)
    result: dict[str, float] = dict(zip(DOMAINS, learned.tolist(), strict=True))
    print("weights found: " + ", ".join(f"{name} {weight:.2f}" for name, weight in result.items()))
    print("adapters trained by       loss on new sequences of the target")
    alone = target.unsqueeze(1).expand(-1, 3, -1)
    rows = {
        "equal weights": (domains, torch.zeros(3)),
        "weights found": (domains, learned.log()),
        "the domain 'same' alone": (domains, torch.tensor([0.0, -99.0, -99.0])),
        "the 16 target sequences": (alone, torch.zeros(3)),
    }
    for name, (data, logits) in rows.items():
        problem, y, _ = train(data, target, logits, alternations, upper_steps=0)
        with torch.no_grad():
            result[name] = float(problem.losses(y, test).mean())
        print(f"{name:<26}{result[name]:.3f}")
    first, rest = SURE + (1 - SURE) / TOKENS, (1 - SURE) / TOKENS
    result["entropy"] = -first * math.log(first) - (TOKENS - 1) * rest * math.log(rest)
    print(f"No model has less than {result['entropy']:.3f}; knowing nothing has {math.log(TOKENS):.3f}.")
    return result


if __name__ == "__main__":
    main()
