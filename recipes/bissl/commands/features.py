"""``bissl features``: the features of both arms' backbones before fine-tuning, side by side, and their scores."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from bilevel.checkpoint import write_atomic
from bilevel.training import derive_seed

from ...experiment.command.parsing import Parser
from ...experiment.errors import ConfigError
from ...experiment.folder.paths import user_path
from ...vision.errors import DataError
from ...vision.imagesets import ImageSet
from ..outcome.features.embedding import Method, tsne
from ..outcome.features.extraction import BATCH_SIZE, BATCHES, LabelledFeatures, arm_features
from ..outcome.features.saved import ArmScores, SavedFeatures
from ..outcome.features.scatter import ScatterPanel, scatter_png
from ..outcome.features.scores import DEFINITIONS, feature_scores, silhouette
from ..outcome.open_run import before_finetuning, check_images, open_finished
from ..outcome.pipeline import Pipeline
from ..outcome.report import write_report
from ..settings.arms import BASELINE, METHOD
from ..settings.run_directory import FEATURES, FEATURES_PICTURE, run_directory
from ..training.image_batches import Batches

Split = Literal["test", "val"]

_DESCRIPTION = f"""\
Features of the backbones of a finished run before fine-tuning: BiSSL's lower-level backbone and the baseline's after
pre-training (paper, section 4.4 and appendix C.1). {BATCHES} batches of training images refresh the statistics of
BatchNorm, then t-SNE draws the test images of each backbone, and k-NN, a linear probe and the silhouette score them.

Written: {FEATURES_PICTURE} and {FEATURES}; in the run's own folder, also its report is written anew. Artifacts stay as
they are.
"""

_TITLES = {METHOD: "BiSSL, lower-level backbone", BASELINE: "baseline, pre-training alone"}


@dataclass(frozen=True)
class Options:
    """How features are embedded and drawn."""

    split: Split
    method: Method
    perplexity: float
    max_points: int
    seed: int


def main(arguments: list[str]) -> int:
    """Make the picture and the scores that `arguments` ask for.

    Raises:
        ConfigError, DataError, ArtifactError: the run, its data or its stages cannot be used, or files are in the way.
    """
    given = _parser().parse_args(arguments)
    run = user_path(given.run)
    target = user_path(given.to) if given.to else run
    there = [name for name in (FEATURES_PICTURE, FEATURES) if (target / name).exists()]
    if there and not given.overwrite:
        raise ConfigError(f"{target} holds {' and '.join(there)} already; replace them with --overwrite, or give --to")
    pipeline = open_finished(run, user_path(given.artifacts) if given.artifacts else None)
    check_images(pipeline.data, run_directory(run), pipeline.workspace.console)
    seed = pipeline.config.seed if given.seed is None else given.seed
    arms = list(dict.fromkeys(given.arms.split(",")))
    options = Options(given.split, given.method, given.perplexity, given.max_points, seed)
    record, picture = show_features(pipeline, arms, options)
    try:
        target.mkdir(parents=True, exist_ok=True)
        write_atomic(target / FEATURES_PICTURE, picture)
        # Last: it marks both as finished.
        write_atomic(target / FEATURES, record.dump())
    except OSError as error:
        raise ConfigError(f"{target} cannot be written to ({error.strerror})") from error
    for arm, entry in record.arms.items():
        print(f"{arm}: {_numbers(entry.scores)}")
    print(f"{target / FEATURES_PICTURE}, {target / FEATURES}" + (f", {_report(run)}" if target == run else ""))
    return 0


def show_features(pipeline: Pipeline, arms: list[str], options: Options) -> tuple[SavedFeatures, bytes]:
    """The record and the PNG of `arms` of a finished run.

    Raises:
        ConfigError, DataError, ArtifactError: as `main`.
    """
    config, sets = pipeline.config, pipeline.data.downstream
    if options.max_points < 3:
        raise ConfigError(f"--max-points: must be at least 3, got {options.max_points}")
    if sets.kind != "single-label":
        raise DataError(
            f"{sets.train.name}: has {sets.kind} labels, but a picture of features needs one class an image"
        )
    images = sets.test if options.split == "test" else sets.val
    artifacts = before_finetuning(pipeline, arms, options.seed)
    chosen = _chosen(images, options)
    records, panels = {}, []
    for arm, artifact in artifacts.items():
        batches = Batches(pipeline.at(arm, options.seed), pipeline.data, pipeline.computing)
        train, shown = arm_features(batches, artifact, images)
        drawn = LabelledFeatures(shown.features[chosen], shown.labels[chosen])
        points = tsne(drawn.features, method=options.method, perplexity=options.perplexity, seed=options.seed)
        scores = {
            **feature_scores(train, shown),
            "silhouette_features": silhouette(drawn.features, drawn.labels),
            "silhouette_embedding": silhouette(points, drawn.labels),
        }
        records[arm] = ArmScores(stage=artifact.stage, key=artifact.key, scores=scores)
        panels.append(ScatterPanel(_TITLES.get(arm, arm), points, _numbers(scores)))
    size = min(BATCH_SIZE, len(sets.train))
    record = SavedFeatures(
        dataset=config.data.downstream,
        split=options.split,
        seed=options.seed,
        method=options.method,
        perplexity=options.perplexity,
        classes=len(images.classes),
        train_images=len(sets.train),
        images=len(images),
        points=len(chosen),
        batch_norm=f"mean over {BATCHES} batches of {size} training images, of each one's means and unbiased variances",
        definitions=DEFINITIONS,
        arms=records,
    )
    labels = images.labels
    assert labels is not None, "labelled sets have labels"
    try:
        return record, scatter_png(panels, labels.numpy()[chosen], images.classes, record.caption())
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _chosen(images: ImageSet, options: Options) -> np.ndarray:
    """Positions of the images that are drawn, the same for every arm."""
    if len(images) <= options.max_points:
        return np.arange(len(images))
    generator = np.random.default_rng(derive_seed(options.seed, "shown features"))
    return np.sort(generator.choice(len(images), options.max_points, replace=False))


def _numbers(scores: dict[str, float | None]) -> str:
    names = {
        "knn_top1": "k-NN {:.1f}%",
        "linear_top1": "linear probe {:.1f}%",
        "silhouette_features": "silhouette {:.3f}",
        "silhouette_embedding": "({:.3f} drawn)",
    }
    shown = [text.format(value) for name, text in names.items() if (value := scores[name]) is not None]
    return ", ".join(shown).replace(", (", " (")


def _report(run: Path) -> Path:
    try:
        return write_report(run)
    except ValueError as error:
        raise ConfigError(f"the report was not written, all other files were: {error}") from error


def _parser() -> Parser:
    parser = Parser(_DESCRIPTION, command="features")
    parser.add_argument("run", metavar="RUN_DIR", help="output folder of a finished run")
    parser.add_argument("--seed", type=int, help="which repeat of the pipeline (default: the run's first)")
    parser.add_argument(
        "--arms",
        default=f"{BASELINE},{METHOD}",
        help="arms of the run, in the order of the panels (default: %(default)s)",
    )
    parser.add_argument("--split", choices=get_args(Split), default="test", help="images to show (default: test)")
    parser.add_argument("--method", choices=get_args(Method), default="sklearn", help="which t-SNE (default: sklearn)")
    parser.add_argument("--perplexity", type=float, default=30.0, help="of t-SNE (default: 30)")
    parser.add_argument(
        "--max-points", type=int, default=5000, help="draw a random choice of as many images (default: 5000)"
    )
    parser.add_argument("--artifacts", metavar="DIR", help="folder of the run's stages (default: RUN_DIR/checkpoints)")
    parser.add_argument("--to", metavar="DIR", help="folder for the files (default: RUN_DIR, with its report)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there already")
    return parser
