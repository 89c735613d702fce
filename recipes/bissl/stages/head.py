"""Stage 2: the downstream head on the frozen backbone."""

import torch

from bilevel.batches import derive_seed
from recipes.bissl.artifact import Artifact, make_key
from recipes.bissl.context import Context
from recipes.bissl.loop import discard_checkpoints, run_steps
from recipes.bissl.models import build_backbone
from recipes.bissl.optim import schedule
from recipes.bissl.supervised import SupervisedModel

STAGE = "head"


def run(context: Context, artifact: Artifact) -> Artifact:
    """Train a fresh head phi_D on the backbone of a pretext artifact.

    The result holds the pretext modules as they were, the head, and as "upper_backbone" the backbone that theta_D
    starts from: the same weights, with the running statistics that the switch head.batch_norm leaves.
    """
    config, sets = context.config, context.data.downstream
    key = _key(context, artifact)
    finished = context.store.find(STAGE, key)
    if finished is not None:
        return finished
    torch.manual_seed(derive_seed(context.seed, STAGE))
    task, pretext = config.downstream_task(sets.train.classes), config.pretext_task()
    original, backbone = build_backbone(config.model.backbone), build_backbone(config.model.backbone)
    heads, head = pretext.build(original), task.build(backbone)
    artifact.load_into({"backbone": original, "heads": heads})
    artifact.load_into({"backbone": backbone})
    context.computing.place(backbone).requires_grad_(False)
    context.computing.place(head)
    optimizer = torch.optim.SGD(
        head.parameters(), lr=config.head.lr, momentum=0.9, weight_decay=config.head.weight_decay
    )
    stack, writer = context.labelled_stack(task, STAGE), context.writer(STAGE)
    total = config.head.epochs * len(stack)
    scheduler = schedule(optimizer, "constant", total_steps=total)
    validation = context.evaluation_batches(sets.val, task)
    backbone.train(config.head.batch_norm == "train")
    model = SupervisedModel(task, backbone, head, context.computing)

    def after(number: int) -> None:
        if number % len(stack) == 0:
            named = {f"val_{name}": value for name, value in model.measure(validation).items()}
            writer.write({"event": "epoch", "step": number, "epoch": number // len(stack), **named})

    directory = context.store.directory(STAGE, key)
    seconds = run_steps(
        lambda: model.step(stack.next(), optimizer, scheduler),
        total=total,
        parts={"backbone": backbone, "head": head, "optimizer": optimizer, "scheduler": scheduler, "stack": stack},
        writer=writer,
        directory=directory,
        checkpoint_every=max(1, total // 4),
        console=context.console,
        description=f"head warm-up, seed {context.seed}",
        after=after,
    )
    info = {
        "pretext_steps": artifact.info["pretext_steps"],
        "label_steps": total,
        "seconds": artifact.info["seconds"] + seconds,
        "seed": context.seed,
    }
    modules = {"backbone": original, "heads": heads, "upper_backbone": backbone, "head": head}
    result = context.store.save(STAGE, key, modules, info)
    discard_checkpoints(directory)
    return result


def _key(context: Context, artifact: Artifact) -> str:
    config = context.config
    return make_key(
        STAGE,
        context.seed,
        artifact,
        config.data.model_dump(exclude={"root", "download", "pretext", "pretext_limit"}),
        config.downstream.model_dump(exclude={"eval_batch_size"}),
        config.head.model_dump(),
        config.compute.model_dump(exclude={"data_device", "micro_batch"}),
    )
