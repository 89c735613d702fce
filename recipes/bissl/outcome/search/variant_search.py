"""A search of one variant: what its trials train, and what they start from."""

import json
import math
import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bilevel.checkpoint import write_atomic
from bilevel.training import NonFiniteError

from ....experiment.artifacts import Artifact, ArtifactError
from ....experiment.errors import ConfigError
from ....experiment.plugins import PluginError
from ....experiment.search.plan import StudyPlan
from ....experiment.search.study import InvalidValues, open_study
from ....experiment.search.study import prepare as prepare_study
from ....experiment.search.trial_record import Scores
from ....experiment.stage import Attempt
from ....vision.errors import DataError
from ....vision.sources.image_cache import TrainAndVal, cache_folder, read_cache, write_cache
from ....vision.torch_metrics import as_metrics
from ...settings.arms import arm_of
from ...settings.config import Config, build_config
from ...settings.sections import HOW_READ
from ...training.compute import Computing
from ...training.costs import artifact_store, read_stage
from ...training.datasets import Datasets
from ...training.given_weights import check_initial_weights
from ...training.memory import out_of_memory_explained
from ...training.repeat import Repeat
from ...training.stages import finetune, head
from ..checks import Checked, check_batches, check_labelled, check_parent
from ..open_run import compute_device, crops_on, make_pipeline
from ..pipeline import Pipeline
from .space import LR, WEIGHT_DECAY, SearchStage, decided

PARENT = "parent.json"
FEWER_WORKERS = "Fewer --workers take less at a time, and the same command goes on with them"


@dataclass(frozen=True)
class Search:
    """One search; everything that a worker process needs.

    Attributes:
        config: the run's; the fields that the search decides are replaced by each trial's.
        artifacts: folder of finished stages and of the image cache.
        stage: what trials train.
        variant: whose.
        plan: the trials.
        given: whether they start from an artifact that the command line names.
    """

    config: Config
    artifacts: Path
    stage: SearchStage
    variant: str
    plan: StudyPlan
    given: bool = False

    @property
    def directory(self) -> Path:
        """The folder of the search."""
        return self.plan.directory

    @property
    def of_pairs(self) -> bool:
        """Whether trials are pairs of learning rate and weight decay."""
        return set(self.plan.space) == {LR, WEIGHT_DECAY}

    @property
    def common_start(self) -> bool:
        """Whether all trials start from one artifact; else a trial's own values may decide what comes before."""
        return self.given or self.of_pairs

    def image_cache(self, digest: str) -> Path:
        """The folder of decoded images: one for all that decides which they are, their own digest included."""
        fields = self.config.data.model_dump(exclude=HOW_READ | {"pretext", "pretext_limit"})
        return cache_folder(self.artifacts, {**fields, "images": digest})

    def fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What a trial's values stand for in the configuration, as nested tables."""
        return decided(self.stage, arm_of(self.variant).rates, values)

    def pipeline(self, data: Datasets, console: Console) -> Pipeline:
        """The pipeline of the run, with events in the folder of the search."""
        return make_pipeline(self.config, self.directory, artifact_store(self.artifacts), data, console=console)


def check(search: Search, given: Artifact | None, data: Datasets, console: Console, *, published: bool = False) -> None:
    """Read the data of a search that is not begun yet; what is wrong must leave nothing behind.

    Args:
        published: as for `check_data`.

    Raises:
        DataError, ConfigError, ArtifactError, PluginError: naming what is wrong, also with the values of a trial that
            is known from the start.
    """
    device = search.pipeline(data, console).computing.device
    pretrains = _pretrains(search)
    if pretrains:
        check_initial_weights(search.config.model, search.config.data.image_size)
    found = _check_batches(search.config, data, device, pretext=pretrains, published=published)
    if given is not None:
        check_parent(given, search.stage, search.config, found.classes)
    for trial in search.plan.trials or ():
        try:
            _trial_config(search, trial.values, data, device, published=published)
        except InvalidValues as error:
            raise ConfigError(
                f"--space: the values of trial {trial.number} do not fit each other or the data: {error}"
            ) from error


def _pretrains(search: Search) -> bool:
    return not search.given and arm_of(search.variant).start != "random"


def _check_batches(config: Config, data: Datasets, device: torch.device, *, pretext: bool, published: bool) -> Checked:
    """Read the labelled images, and those of `pretext`, and see whether the config's batches can be made of them."""
    computing = Computing(config.with_crops(crops_on(device)).compute, device)
    return (check_batches if pretext else check_labelled)(config, data, computing, published=published)


def _trial_config(
    search: Search, values: Mapping[str, Any], data: Datasets, device: torch.device, *, published: bool = False
) -> Config:
    """The configuration of a trial, checked against the data as that of a run is.

    Raises:
        InvalidValues: the values do not fit each other or the data.
        DataError, ConfigError, PluginError: it is not the values, but the search's own config or data.
    """
    # A trial whose values do not reach the pretext images may find all that is made of them.
    reached = {field.partition(".")[0] for field in search.plan.space} & {"pretext", "model", "compute", "bissl"}
    check = partial(_check_batches, pretext=_pretrains(search) and bool(reached), published=published)
    try:
        config = build_config(search.config, search.fields(values))
        if not search.of_pairs:
            if config.model != search.config.model:
                check_initial_weights(config.model, config.data.image_size)
            check(config, data, device)
    except (ConfigError, DataError, ArtifactError, PluginError) as error:
        check(search.config, data, device)
        raise InvalidValues(str(error)) from error
    return config


def prepare(search: Search, given: Artifact | None, data: Datasets, console: Console) -> None:
    """Make or find what all trials start from: the artifact, the decoded images and the study, by one process.

    Args:
        given: the artifact to start from; None: that of the variant, trained here unless it is among the artifacts.
        data: the images, read where they must be.

    Raises:
        ConfigError: the search was begun from another artifact.
        DataError, ArtifactError, NonFiniteError: as the stages raise them.
    """
    path = search.directory / PARENT

    def make() -> None:
        pipeline = search.pipeline(data, console)
        # Before the artifact: what is wrong with labelled data must not be found after pre-training.
        check_labelled(search.config, data, pipeline.computing)
        begun = _begun(search)["images"] if path.exists() else None
        images = data.identity.labelled if begun is not None or _is_cached(data) else None
        _check_images(search, data, begun)
        if images is not None and search.common_start and not search.image_cache(images).exists():
            write_cache(search.image_cache(images), data.downstream)
        if not path.exists():
            made = given
            if given is None and search.common_start:
                made = _pretrained(search, pipeline, pipeline.at(search.variant, search.config.seed))
            where = None if made is None else str(made.directory.resolve())
            write_atomic(path, json.dumps({"directory": where, "images": images}).encode())

    def higher_is_better() -> bool:
        task = search.config.downstream_task(data.downstream.train.classes)
        return next(iter(as_metrics(task.metrics()).values())).higher_is_better

    prepare_study(search.plan, higher_is_better, lambda: path.exists() and _has_images(search), make)
    known = _parent(search)
    if given is not None and (known is None or known.key != given.key):
        raise ConfigError(f"--from: {search.directory} was begun from another artifact; name another --output-dir")


def _check_images(search: Search, data: Datasets, begun: str | None) -> None:
    """Refuse labelled images other than those with the digest `begun`."""
    if begun not in (None, data.identity.labelled):
        raise DataError(
            f"{data.downstream.train.name}: the labelled images are others than those that the search in "
            f"{search.directory} was begun with; put them back as they were, or name another --output-dir"
        )


def _has_images(search: Search) -> bool:
    """Whether the images that lie in memory are in the cache, if trials read them there."""
    images = _begun(search)["images"]
    return images is None or not search.common_start or search.image_cache(images).exists()


def _is_cached(data: Datasets) -> bool:
    """Whether the labelled images lie in memory, which the processes of a search then share."""
    sets = data.downstream
    return sets.train.images.in_memory and sets.val.images.in_memory


def work(search: Search, console: Console, *, only: int | None = None, processes: int = 1) -> None:
    """Do trials until none is left, as `TrialStudy.work`.

    Args:
        processes: of the search on this machine, which share its cores.
        only: the one trial to do instead, or to wait for.
    """
    # Stages before the last have all sets in their keys; where trials make them, nothing of a set can be left out.
    data = Datasets(search.config, partial(_train_and_val, search) if search.common_start else None, processes)
    if not search.common_start:
        _check_images(search, data, _begun(search)["images"])
    with closing(data.workers), open_study(search.plan) as study:
        study.work(partial(_fit, search, data, _parent(search)), console, only=None if only is None else (only,))


def _train_and_val(search: Search) -> TrainAndVal:
    """Images in memory from the cache, which all processes of a machine share; streamed ones by listing them again."""
    images = _begun(search)["images"]
    if images is not None:
        return read_cache(search.image_cache(images))
    sets = Datasets(search.config).downstream
    return TrainAndVal(sets.train, sets.val)


def _fit(
    search: Search, data: Datasets, parent: Artifact | None, values: Mapping[str, Any], attempt: Attempt
) -> Scores:
    """Train with a trial's values, and score it on validation.

    Raises:
        NonFiniteError: training diverged, or its score is not finite.
        InvalidValues: the values do not fit each other, the data or the memory.
        ConfigError, DataError: something else is wrong, such as too little memory whatever the values.
    """
    config = _trial_config(search, values, data, compute_device(search.config))
    try:
        return _trained(search, config, data, parent, attempt)
    except (ConfigError, DataError) as error:
        # Messages name the field that is wrong.
        if any(re.search(rf"(?<![\w.]){re.escape(field)}(?!\w|\.\w)", str(error)) for field in search.plan.space):
            raise InvalidValues(str(error)) from error
        raise


def _trained(search: Search, config: Config, data: Datasets, parent: Artifact | None, attempt: Attempt) -> Scores:
    # Several trials may need the same stage.
    store = artifact_store(search.artifacts, waits=True)
    pipeline = make_pipeline(config, attempt.directory, store, data, console=Console(quiet=True))
    repeat, workspace = pipeline.at(search.variant, config.seed), pipeline.workspace
    if not search.common_start:
        parent = _pretrained(search, pipeline, repeat)
    if search.stage == "head":
        assert parent is not None, "a head's warm-up has a backbone"
        with out_of_memory_explained("head", config, pipeline.computing.device, FEWER_WORKERS):
            warmed = head.fit(repeat, pipeline.data, pipeline.computing, workspace, parent, attempt)
        # The bilevel stage starts from the last epoch's head, whatever an earlier one was worth.
        metric, higher, epoch = warmed.primary_metric, warmed.higher_is_better, warmed.epochs
        found, costs = warmed.values, warmed.costs
    else:
        with out_of_memory_explained("finetune", config, pipeline.computing.device, FEWER_WORKERS):
            fitted = finetune.fit(repeat, pipeline.data, pipeline.computing, workspace, parent, attempt)
        found = dict(fitted.facts["best"])
        metric, epoch = fitted.facts["primary_metric"], int(found.pop("epoch"))
        higher, costs = fitted.facts["higher_is_better"][metric], fitted.costs
    score, loss = found[metric], found["loss"]
    if not (math.isfinite(score) and math.isfinite(loss)):
        raise NonFiniteError(f"validation: {metric} {score}, loss {loss}")
    finite = {name: value if math.isfinite(value) else None for name, value in found.items()}
    return Scores(epoch, metric, higher, score, loss, finite, costs.label_steps, costs.seconds)


def _pretrained(search: Search, pipeline: Pipeline, repeat: Repeat) -> Artifact | None:
    return pipeline.pretext(repeat) if search.stage == "head" else pipeline.pretrain(repeat, {})


def _parent(search: Search) -> Artifact | None:
    """What all trials start from, None for random weights or where each makes its own."""
    where = _begun(search)["directory"]
    return None if where is None else read_stage(Path(where))


def _begun(search: Search) -> dict[str, str | None]:
    """Where that lies, as "directory", and as "images" the digest of the images in the cache, None for none."""
    path = search.directory / PARENT
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: found[name] for name in ("directory", "images")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); delete it to look for the artifact again") from error
