"""The four stages: what each makes of the artifact before it, and when it is not made again."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from bilevel import CG, AlternatingSchedule
from bilevel.products import ReverseOverReverse
from recipes.bissl.outcome.pipeline import Pipeline
from recipes.bissl.settings.config import Config, build_config
from recipes.bissl.training import supervised
from recipes.bissl.training.compute import Computing
from recipes.bissl.training.stages import bissl, pretext
from recipes.bissl.training.stages.finetune import _Best
from recipes.experiment.artifacts import Artifact, ArtifactStore
from recipes.experiment.workspace import Workspace
from recipes.vision.metrics import Metric, evaluate, top_k
from recipes.vision.networks.backbones import build_backbone
from recipes.vision.optimizers import LARS
from recipes.vision.shards import Rows
from tests.support.recipes.small_runs import (
    STAGES,
    batches_of,
    events,
    execute,
    of_stage,
    part,
    run_all,
    run_stage,
    small_config,
    small_pipeline,
)

# Values at which a limit or a decay that is left out shows in the weights.
NOTICEABLE = "--bissl.solver", "identity", "--bissl.max-grad-norm", "0.3", "--pretext.weight-decay", "0.05"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Pipeline:
    return small_pipeline(folder, small_config(*NOTICEABLE))


@pytest.fixture(scope="module")
def made(pipeline: Pipeline) -> dict[str, Artifact]:
    return run_all(pipeline)


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def statistics(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if "running" in key or "num_batches" in key}


def parameters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key not in statistics(state)}


def test_steps_of_each_stage_add_up(made: dict[str, Artifact]) -> None:
    counts = {name: (artifact.info["pretext_steps"], artifact.info["label_steps"]) for name, artifact in made.items()}
    assert counts == {"pretext": (4, 0), "head": (4, 4), "bissl": (8, 8), "finetune": (8, 16)}
    seconds = [artifact.info["seconds"] for artifact in made.values()]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


def test_pretext_is_watched(made: dict[str, Artifact], folder: Path) -> None:
    assert [line["step"] for line in of_stage(folder, "pretext", "train")] == [1, 2, 3, 4]
    seen = of_stage(folder, "pretext", "monitor")
    assert [(line["step"], line["epoch"]) for line in seen] == [(2, 1.0), (4, 2.0)]
    for line in seen:
        assert 0 <= line["knn_top1"] <= 100
        assert 0 < line["embedding_spread"] <= 1


def test_watching_changes_no_weight(made: dict[str, Artifact], tmp_path: Path) -> None:
    config = small_config(*NOTICEABLE, "--pretext.monitor-every", "9", "--pretext.checkpoint-every", "9")
    artifact = run_stage(small_pipeline(tmp_path, config), "pretext")
    assert artifact.key == made["pretext"].key
    assert same(artifact.tensors(), made["pretext"].tensors())
    assert [line["step"] for line in of_stage(tmp_path, "pretext", "monitor")] == [4]


def test_head_leaves_the_backbone_alone(made: dict[str, Artifact], folder: Path) -> None:
    before, after = made["pretext"], made["head"]
    assert same(part(after, "backbone"), part(before, "backbone"))
    assert same(part(after, "heads"), part(before, "heads"))
    assert same(part(after, "upper_backbone"), part(before, "backbone"))
    assert part(after, "head").keys() == {"weight", "bias"}
    rates = {line["lr"] for line in of_stage(folder, "head", "train")}
    assert len(rates) == 1


def test_head_in_train_mode_moves_only_the_upper_statistics(
    made: dict[str, Artifact], pipeline: Pipeline, tmp_path: Path
) -> None:
    config = build_config(pipeline.config, {"head": {"batch_norm": "train"}})
    artifact = run_stage(small_pipeline(tmp_path, config), "head", made["pretext"])
    before, upper = part(made["pretext"], "backbone"), part(artifact, "upper_backbone")
    assert same(part(artifact, "backbone"), before)
    assert same(parameters(upper), parameters(before))
    moved = statistics(upper)
    assert not any(torch.equal(moved[key], before[key]) for key in moved)
    # One pass a step, none from validation.
    assert {int(moved[key] - before[key]) for key in moved if "num_batches" in key} == {4}


def warm_cosine(step: int, total: int, warm: int) -> float:
    """The schedule of the lower level, from its definition."""
    if step < warm:
        return (step + 1) / (warm + 1)
    return float((1 + torch.cos(torch.tensor(torch.pi * (step - warm) / (total - warm), dtype=torch.float64))) / 2)


def clip(gradients: list[Tensor], limit: float) -> list[Tensor]:
    norm = torch.cat([g.reshape(-1) for g in gradients]).norm()
    return [g * limit / norm if norm > limit else g for g in gradients]


def test_bilevel_stage_is_algorithm_1(made: dict[str, Artifact], pipeline: Pipeline, folder: Path) -> None:
    """Both levels again with plain modules, autograd and optimizers; the solver is the identity here."""
    config, c = pipeline.config, pipeline.config.bissl
    tasks = config.pretext_task(), config.downstream_task(pipeline.data.downstream.train.classes)
    theta_p, theta_d = build_backbone(config.model.backbone), build_backbone(config.model.backbone)
    phi_p, phi_d = tasks[0].build(theta_p), tasks[1].build(theta_d)
    made["head"].load_into({"backbone": theta_p, "upper_backbone": theta_d, "heads": phi_p, "head": phi_d})
    for module in (theta_p, theta_d, phi_p, phi_d):
        module.train()
    lower, upper = [*theta_p.parameters(), *phi_p.parameters()], [*theta_d.parameters(), *phi_d.parameters()]
    lars = LARS(lower, lr=c.lower_lr, weight_decay=config.pretext.weight_decay)
    sgd = torch.optim.SGD(upper, lr=c.upper_lr, momentum=0.9, weight_decay=c.upper_weight_decay)
    batches = batches_of(pipeline)
    stacks = batches.pretext(tasks[0], "bissl lower", 4), batches.labelled(tasks[1], "bissl upper", 4)
    seen: list[tuple[str, float, float]] = []

    def update(
        level: str, optimizer: torch.optim.Optimizer, gradients: list[Tensor], rate: float, loss: Tensor
    ) -> None:
        limited = clip(gradients, 0.3)
        for group in optimizer.param_groups:
            group["lr"] = rate
            for p, g in zip(group["params"], limited, strict=True):
                p.grad = g
        optimizer.step()
        seen.append((level, rate, loss.item()))

    for alternation in (1, 2):
        stacks[0].begin_stage(2)
        for step in range(2):
            loss = tasks[0].loss(theta_p, dict(phi_p.items()), stacks[0].next())
            pull = sum(
                (a - b.detach()).square().sum() for a, b in zip(theta_p.parameters(), theta_d.parameters(), strict=True)
            )
            gradients = torch.autograd.grad(loss + 0.5 * c.regularization_weight * pull, lower)
            rate = c.lower_lr * warm_cosine(2 * alternation - 2 + step, 4, 2)
            update("lower", lars, list(gradients), rate, loss)
        if alternation == 2:
            with torch.no_grad():
                for a, b in zip(theta_d.parameters(), theta_p.parameters(), strict=True):
                    a.copy_((1 - c.adaptation_strength) * a + c.adaptation_strength * b)
        stacks[1].begin_stage(2)
        for step in range(2):
            images, labels = stacks[1].next()
            kept = {key: value.clone() for key, value in theta_p.named_buffers()}
            own = {key: value.clone() for key, value in theta_d.named_buffers()}
            through = nn.functional.cross_entropy(phi_d(theta_p(images)), labels)
            direct = c.gamma * nn.functional.cross_entropy(phi_d(theta_d(images)), labels)
            v = torch.autograd.grad(through, [*theta_p.parameters(), *phi_d.parameters()])
            g = torch.autograd.grad(direct, upper)
            for module, values in ((theta_p, kept), (theta_d, own)):
                for key, buffer in module.named_buffers():
                    buffer.copy_(values[key])
            rate = c.upper_lr * warm_cosine(2 * alternation - 2 + step, 4, 0)
            update("upper", sgd, [a + b for a, b in zip(v, g, strict=True)], rate, through + direct)
            with torch.no_grad():
                theta_d(images)
    lines = [line for line in events(folder) if line["stage"] == "bissl" and line["event"] in ("lower", "upper")]
    assert [line["event"] for line in lines] == [level for level, _, _ in seen]
    assert [line["lr"] for line in lines] == pytest.approx([rate for _, rate, _ in seen], rel=1e-6)
    assert [line["loss"] for line in lines] == pytest.approx([loss for _, _, loss in seen], rel=1e-4)
    for name, module in {"backbone": theta_p, "upper_backbone": theta_d, "heads": phi_p, "head": phi_d}.items():
        for key, value in part(made["bissl"], name).items():
            torch.testing.assert_close(value, module.state_dict()[key], rtol=1e-4, atol=1e-6)
    assert not same(parameters(part(made["bissl"], "upper_backbone")), parameters(part(made["head"], "upper_backbone")))


def test_bilevel_stage_hands_on_its_settings(
    made: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def stop(*args: Any, **options: Any) -> None:
        given.extend(args)
        raise KeyboardInterrupt

    monkeypatch.setattr(bissl, "Trainer", stop)
    settings = {
        **{"alternations": 7, "lower_steps": 6, "upper_steps": 5, "adaptation_every": 3, "adaptation_strength": 0.4},
        **{"hessian_batches": 4, "damping": 1.25, "max_grad_norm": None, "hvp": "reverse-kept"},
        **{"solver": "cg", "layerwise": True, "solver_iterations": 9, "solver_rtol": 0.25},
    }
    config = build_config(small_config(), {"bissl": settings})
    with pytest.raises(KeyboardInterrupt):
        run_stage(small_pipeline(tmp_path, config), "bissl", made["head"])
    _, upper, lower, schedule, method = given
    names = build_backbone(config.model.backbone).state_dict().keys()
    pairs = {f"backbone.{n}": f"backbone.{n}" for n in names if "running" not in n and "num_" not in n}
    assert schedule == AlternatingSchedule(7, 6, 5, 3, 0.4, adaptation_pairs=pairs)
    assert (upper.max_grad_norm, lower.max_grad_norm) == (None, None)
    assert (method.hessian_batches, method.damping) == (4, 1.25)
    assert method.hvp == ReverseOverReverse(keep_graph=True)
    assert method.solver == CG(9, 0.25, True)


def test_bilevel_stage_tells_what_it_did(made: dict[str, Artifact], folder: Path) -> None:
    counts = {name: len(of_stage(folder, "bissl", name)) for name in ("lower", "upper", "adaptation", "alternation")}
    assert counts == {"lower": 4, "upper": 4, "adaptation": 1, "alternation": 2}
    # In the last alternation too, between its levels.
    assert of_stage(folder, "bissl", "adaptation")[0]["alternation"] == 2
    for line in of_stage(folder, "bissl", "upper"):
        assert {"residual", "status", "stationarity", "num_hvps", "grad_norm", "lr", "loss"} <= line.keys()
    # Two alternations of two upper steps, with the solver `identity`.
    assert made["bissl"].info["solves"] == {"BUDGET": 4}
    assert made["finetune"].info["solves"] == {"BUDGET": 4}


def accuracy(pipeline: Pipeline, artifact: Artifact, k: int) -> float:
    """Top-k of an artifact's weights on the test images, without the recipe's metrics or evaluation loop."""
    sets, task = pipeline.data.downstream, pipeline.config.downstream_task(pipeline.data.downstream.train.classes)
    backbone = build_backbone(pipeline.config.model.backbone)
    classifier = task.build(backbone)
    artifact.load_into({"backbone": backbone, "head": classifier})
    backbone.eval()
    view, labels = task.evaluation_view(), sets.test.labels
    assert view is not None
    assert labels is not None
    with torch.no_grad():
        best = classifier(backbone(view(sets.test.images.stacked()))).argsort(dim=1, descending=True)[:, :k]
    return 100.0 * float((best == labels[:, None]).any(dim=1).double().mean())


def test_fine_tuning_tests_the_best_epoch(made: dict[str, Artifact], pipeline: Pipeline, folder: Path) -> None:
    info = made["finetune"].info
    lines = of_stage(folder, "finetune", "epoch")
    assert [line["epoch"] for line in lines] == [2, 4]
    best = max(lines, key=lambda line: (line["val_top1"], -line["val_loss"], -line["epoch"]))
    assert info["best"] == {"epoch": best["epoch"], **{n: best[f"val_{n}"] for n in ("top1", "top5", "loss")}}
    assert info["test"]["top1"] == pytest.approx(accuracy(pipeline, made["finetune"], 1))
    assert info["test"]["top5"] == pytest.approx(accuracy(pipeline, made["finetune"], 5))
    assert (info["primary_metric"], info["seed"], info["variant"]) == ("top1", 0, "bissl")
    train = of_stage(folder, "finetune", "train")
    assert [line["step"] for line in train] == list(range(1, 9))
    assert lines[0]["train_loss"] == pytest.approx(sum(line["loss"] for line in train[:4]) / 4)
    cosine = [pipeline.config.finetune.lr * warm_cosine(step, 8, 0) for step in range(8)]
    assert [line["lr"] for line in train] == pytest.approx(cosine)


def test_fine_tuning_goes_back_to_the_best_epoch(
    made: dict[str, Artifact], pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    outputs: list[Tensor] = []

    def better_first(forward: Callable[[Rows], Tensor], *others: Any) -> dict[str, float]:
        with torch.no_grad():
            outputs.append(forward(Rows(probe, len(probe))))
        return {**evaluate(forward, *others), "top1": 60.0 - len(outputs)}

    monkeypatch.setattr(supervised, "evaluate", better_first)
    artifact = run_stage(small_pipeline(tmp_path, pipeline.config), "finetune", made["bissl"])
    assert artifact.info["best"]["epoch"] == 2
    validated_first, validated_last, tested = outputs
    assert torch.equal(tested, validated_first)
    assert not torch.equal(validated_last, validated_first)
    backbone = build_backbone(pipeline.config.model.backbone)
    classifier = pipeline.config.downstream_task(pipeline.data.downstream.train.classes).build(backbone)
    artifact.load_into({"backbone": backbone, "head": classifier})
    assert torch.equal(classifier(backbone.eval()(probe)), validated_first)


def test_arms_differ_in_rates_and_start(made: dict[str, Artifact], pipeline: Pipeline) -> None:
    config = build_config(pipeline.config, {"finetune": {"baseline_lr": 0.07, "scratch_lr": 0.08}})
    here = small_pipeline(pipeline.workspace.folder, config)
    scratch = here.finetune(here.at("scratch", 0), None)
    baseline = here.finetune(here.at("baseline", 0), made["pretext"])
    assert (scratch.info["pretext_steps"], scratch.info["label_steps"]) == (0, 8)
    assert (baseline.info["pretext_steps"], baseline.info["label_steps"]) == (4, 8)
    lines = of_stage(pipeline.workspace.folder, "finetune", "train")
    first = {line["variant"]: line for line in reversed(lines)}
    assert first["scratch"]["lr"] == 0.08
    assert first["baseline"]["lr"] == 0.07
    # Same seed, same fresh head, same first batch: only the backbones differ.
    assert len({line["loss"] for line in first.values()}) == 3


METRICS = {"high": top_k(1), "low": Metric(top_k(1).accumulate, top_k(1).compute, higher_is_better=False)}


@pytest.mark.parametrize(
    ("metric", "offers", "first", "lower_loss"),
    [
        ("high", [(50.0, 1.0), (60.0, 2.0), (55.0, 0.1)], 2, 2),
        ("low", [(50.0, 1.0), (60.0, 0.1), (40.0, 2.0)], 3, 3),
        ("high", [(50.0, 1.0), (50.0, 0.5), (50.0, 0.7)], 1, 2),
        ("high", [(40.0, 0.1), (50.0, 1.0), (45.0, 0.1), (50.0, 0.5)], 2, 4),
        ("low", [(50.0, 1.0), (40.0, 0.9), (40.0, 0.5)], 2, 3),
        ("high", [(50.0, 1.0), (50.0, 1.0)], 1, 1),
        ("high", [(float("nan"), 1.0), (10.0, 1.0)], 2, 2),
        ("low", [(float("nan"), 1.0), (10.0, 1.0)], 2, 2),
        # A network whose loss is not finite is worse than any other, whatever its score.
        ("high", [(50.0, float("nan")), (50.0, 3.0)], 2, 2),
        ("high", [(50.0, 1.0), (float("nan"), 0.1), (60.0, float("nan"))], 1, 1),
    ],
)
@pytest.mark.parametrize("ties", ["first", "lower-loss"])
def test_best_epoch(
    metric: str, offers: list[tuple[float, float]], first: int, lower_loss: int, ties: Literal["first", "lower-loss"]
) -> None:
    model, best = nn.Linear(1, 1), first if ties == "first" else lower_loss
    keeper = _Best(model, {metric: METRICS[metric]}, ties)
    for epoch, (score, loss) in enumerate(offers, 1):
        nn.init.constant_(model.weight, float(epoch))
        keeper.offer(epoch, {metric: score, "loss": loss})
    keeper.restore()
    assert keeper.epoch == best
    assert model.weight.item() == best


def test_finished_stages_are_not_made_again(
    made: dict[str, Artifact], pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage in STAGES.values():
        monkeypatch.setattr(stage, "build_backbone", None)
    assert run_all(pipeline) == made


class Finding(ArtifactStore):
    """Takes every artifact for finished, so that running a stage only names it."""

    def find(self, stage: str, key: str) -> Artifact:
        return Artifact(stage, key, self.folder, {"pretext_steps": 0, "label_steps": 0, "seconds": 0.0})


KEYS = [
    ("seeds", 9, ""),
    ("threads", 2, ""),
    ("data.root", "elsewhere", ""),
    ("data.download", True, ""),
    ("pretext.monitor_every", 7, ""),
    ("pretext.checkpoint_every", 7, ""),
    ("pretext.baseline_epochs", 7, ""),
    ("downstream.eval_batch_size", 7, ""),
    ("bissl.checkpoint_every", 7, ""),
    ("finetune.checkpoint_every", 7, ""),
    ("finetune.baseline_lr", 0.123, ""),
    ("finetune.lr", 0.123, "finetune"),
    ("finetune.epochs", 7, "finetune"),
    ("finetune.ties", "first", "finetune"),
    ("finetune.lr_floor", 0.001, "finetune"),
    ("bissl.fresh_hessian_batches", True, "bissl finetune"),
    ("bissl.upper_lr_floor", 0.001, "bissl finetune"),
    ("bissl.lower_warmup_steps", 1, "bissl finetune"),
    ("bissl.gamma", 0.123, "bissl finetune"),
    ("bissl.solver_iterations", 7, "bissl finetune"),
    ("head.lr", 0.123, "head bissl finetune"),
    ("downstream.batch_size", 7, "head bissl finetune"),
    ("downstream.options", {"eval_resize": 9}, "head bissl finetune"),
    ("data.labels_per_class", 2, "head bissl finetune"),
    ("data.val_per_class", 1, "head bissl finetune"),
    ("pretext.lr", 0.123, "pretext head bissl finetune"),
    ("pretext.options", {"temperature": 0.123}, "pretext head bissl finetune"),
    ("data.pretext_limit", 40, "pretext head bissl finetune"),
    ("data.test_fraction", 0.3, "pretext head bissl finetune"),
    ("data.split_seed", 99, "pretext head bissl finetune"),
    ("model.backbone", "resnet-small", "pretext head bissl finetune"),
    ("model.zero_init_residual", True, "pretext head bissl finetune"),
    ("seed", 5, "pretext head bissl finetune"),
    ("compute.precision", "bf16", "pretext head bissl finetune"),
    ("compute.tf32", True, "pretext head bissl finetune"),
    ("compute.channels_last", True, "pretext head bissl finetune"),
    ("compute.compile", True, "pretext head bissl finetune"),
    ("compute.crops", "float", "pretext head bissl finetune"),
    ("compute.micro_batch", 10, "pretext head bissl finetune"),
]


@pytest.mark.parametrize(("field", "value", "expected"), KEYS)
def test_a_change_remakes_what_it_decides_and_nothing_else(
    field: str, value: Any, expected: str, pipeline: Pipeline, tmp_path: Path
) -> None:
    def keys(config: Config) -> dict[str, str]:
        workspace = Workspace(tmp_path, Finding(tmp_path))
        here = Pipeline(config, pipeline.data, Computing(config.compute, torch.device("cpu")), workspace)
        return {name: artifact.key for name, artifact in run_all(here).items()}

    override: Any = value
    for name in reversed(field.split(".")):
        override = {name: override}
    before, after = keys(pipeline.config), keys(build_config(pipeline.config, override))
    assert [name for name in STAGES if before[name] != after[name]] == expected.split()


def test_divergence_stops_before_a_weight_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = pretext.pretext_loss, [0]

    def poisoned(*given: Any) -> Tensor:
        calls[0] += 1
        return real(*given) * (float("nan") if calls[0] == 3 else 1.0)

    monkeypatch.setattr(pretext, "pretext_loss", poisoned)
    assert execute("--output-dir", str(tmp_path / "run")) == 3
    error = capsys.readouterr().err
    assert re.match(r"run\.py: stopped: pretext step \d+: loss nan", error)
    assert "no variable was changed" in error
    assert error.count("\n") == 1
    assert len(of_stage(tmp_path / "run", "pretext", "train")) == 2
