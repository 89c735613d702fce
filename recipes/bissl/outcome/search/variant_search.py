"""A search of one variant: what its trials train, and what they start from."""

import json
import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from bilevel.checkpoint import write_atomic
from bilevel.training import NonFiniteError

from ....experiment.artifacts import Artifact
from ....experiment.errors import ConfigError
from ....experiment.search.queue import TrialQueue
from ....experiment.search.trial_record import Scores
from ....experiment.stage import Attempt
from ....experiment.workspace import Workspace
from ....vision.errors import DataError
from ....vision.sources.image_cache import TrainAndVal, cache_folder, read_cache, write_cache
from ...settings.arms import arm_of
from ...settings.config import Config
from ...settings.run_directory import PROJECT
from ...settings.sections import HOW_READ
from ...training.costs import artifact_store, read_stage
from ...training.datasets import Datasets
from ...training.repeat import Repeat
from ...training.stages import finetune, head
from ..checks import check_data, check_labelled, check_parent
from ..open_run import make_pipeline
from ..pipeline import Pipeline
from .space import SearchStage, decided, with_values

PARENT = "parent.json"


@dataclass(frozen=True)
class Search:
    """One search; everything that a worker process needs.

    Attributes:
        config: the run's; the fields that the search decides are replaced by each trial's.
        artifacts: folder of finished stages and of the image cache.
        stage: what trials train.
        variant: whose.
        queue: the trials.
    """

    config: Config
    artifacts: Path
    stage: SearchStage
    variant: str
    queue: TrialQueue

    @property
    def directory(self) -> Path:
        """The folder of the search."""
        return self.queue.directory

    def image_cache(self, digest: str) -> Path:
        """The folder of decoded images: one for all that decides which they are, their own digest included."""
        fields = self.config.data.model_dump(exclude=HOW_READ | {"pretext", "pretext_limit"})
        return cache_folder(self.artifacts, {**fields, "images": digest})

    def fields(self, values: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Section -> field -> value: what a trial's values stand for."""
        return decided(self.stage, arm_of(self.variant).rates, values)

    def pipeline(self, data: Datasets, console: Console) -> Pipeline:
        """The pipeline of the run, with events in the folder of the search."""
        return make_pipeline(self.config, self.directory, artifact_store(self.artifacts), data, console=console)


def check(search: Search, given: Artifact | None, data: Datasets, console: Console, *, published: bool = False) -> None:
    """Read the data of a search that is not begun yet; what is wrong must leave nothing behind.

    Args:
        published: as for `check_data`.

    Raises:
        DataError, ConfigError, ArtifactError: naming what is wrong.
    """
    computing = search.pipeline(data, console).computing
    pretrains = given is None and arm_of(search.variant).start != "random"
    found = (check_data if pretrains else check_labelled)(search.config, data, computing, published=published)
    if given is not None:
        check_parent(given, search.stage, search.config, found.classes)


def prepare(search: Search, given: Artifact | None, data: Datasets, console: Console) -> None:
    """Make or find what all trials start from: the artifact and the decoded images. One process does it, others wait.

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
        if begun not in (None, images):
            raise DataError(
                f"{data.downstream.train.name}: the labelled images are others than those that the search in "
                f"{search.directory} was begun with; put them back as they were, or name another --output-dir"
            )
        if images is not None and not search.image_cache(images).exists():
            write_cache(search.image_cache(images), data.downstream)
        if not path.exists():
            made = given if given is not None else _pretrained(search, pipeline)
            where = None if made is None else str(made.directory.resolve())
            write_atomic(path, json.dumps({"directory": where, "images": images}).encode())

    search.queue.prepare(lambda: path.exists() and _has_images(search), make)
    known = _parent(search)
    if given is not None and (known is None or known.key != given.key):
        raise ConfigError(f"--from: {search.directory} was begun from another artifact; name another --output-dir")


def _has_images(search: Search) -> bool:
    """Whether the images that lie in memory are in the cache."""
    images = _begun(search)["images"]
    return images is None or search.image_cache(images).exists()


def _is_cached(data: Datasets) -> bool:
    """Whether the labelled images lie in memory, which the processes of a search then share."""
    sets = data.downstream
    return sets.train.images.in_memory and sets.val.images.in_memory


def work(search: Search, console: Console, *, only: int | None = None, processes: int = 1) -> None:
    """Do trials until none is left, as `TrialQueue.work`.

    Args:
        processes: of the search on this machine, which share its cores.
        only: the one trial to do instead, or to wait for.
    """
    data = Datasets(search.config, partial(_train_and_val, search), processes)
    fit = partial(_fit, search, search.pipeline(data, console), _parent(search))
    with closing(data.workers):
        search.queue.work(fit, console, only=None if only is None else (only,))


def _train_and_val(search: Search) -> TrainAndVal:
    """Images in memory from the cache, which all processes of a machine share; streamed ones by listing them again."""
    images = _begun(search)["images"]
    if images is not None:
        return read_cache(search.image_cache(images))
    sets = Datasets(search.config).downstream
    return TrainAndVal(sets.train, sets.val)


def _fit(
    search: Search, pipeline: Pipeline, parent: Artifact | None, values: Mapping[str, float], attempt: Attempt
) -> Scores:
    """Train with a trial's values, and score it on validation.

    Raises:
        NonFiniteError: training diverged, or its score is not finite.
    """
    config = with_values(search.config, search.fields(values))
    repeat = Repeat.of(config, search.variant, config.seed)
    workspace = Workspace(attempt.directory, pipeline.workspace.store, Console(quiet=True), config.tracking, PROJECT)
    if search.stage == "head":
        assert parent is not None, "a head's warm-up has a backbone"
        warmed = head.fit(repeat, pipeline.data, pipeline.computing, workspace, parent, attempt)
        # The bilevel stage starts from the last epoch's head, whatever an earlier one was worth.
        metric, higher, epoch = warmed.primary_metric, warmed.higher_is_better, warmed.epochs
        found, costs = warmed.values, warmed.costs
    else:
        fitted = finetune.fit(repeat, pipeline.data, pipeline.computing, workspace, parent, attempt)
        found = dict(fitted.facts["best"])
        metric, epoch = fitted.facts["primary_metric"], int(found.pop("epoch"))
        higher, costs = fitted.facts["higher_is_better"][metric], fitted.costs
    score, loss = found[metric], found["loss"]
    if not (math.isfinite(score) and math.isfinite(loss)):
        raise NonFiniteError(f"validation: {metric} {score}, loss {loss}")
    finite = {name: value if math.isfinite(value) else None for name, value in found.items()}
    return Scores(epoch, metric, higher, score, loss, finite, costs.label_steps, costs.seconds)


def _pretrained(search: Search, pipeline: Pipeline) -> Artifact | None:
    repeat = pipeline.at(search.variant, search.config.seed)
    return pipeline.pretext(repeat) if search.stage == "head" else pipeline.pretrain(repeat, {})


def _parent(search: Search) -> Artifact | None:
    """What the trials start from, None for random weights."""
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
