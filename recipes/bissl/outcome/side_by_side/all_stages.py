"""A run as a whole into its folder: all stages, one after the other or side by side, its results and its report."""

from functools import partial
from typing import Any

from bilevel.distributed import rank

from ....experiment.errors import ConfigError
from ....experiment.events import LOCK
from ....experiment.folder.run_folder import METRICS, REPORT, RESULTS, RunDirectory
from ....experiment.records import order_events
from ..open_run import begin
from ..pipeline import Pipeline
from ..report import write_report
from ..results import summarise
from .job_graph import place_of
from .workers import make_side_by_side, worker_count


def run_whole(pipeline: Pipeline, directory: RunDirectory) -> dict[str, Any]:
    """All stages of all variants into an opened run directory; the content of its results.json.

    Raises:
        ConfigError: the report could not be written; everything else was.
        JobFailed, JobLost: of stages that are made side by side.
    """
    begin(pipeline.data, directory)
    count = worker_count(pipeline.config, pipeline.computing.device)
    try:
        if count > 1:
            make_side_by_side(pipeline, count)
    finally:
        if rank() == 0:
            # One that was killed with its workers has left it too.
            (directory.path / LOCK).unlink(missing_ok=True)
    # Of stages that are made by now only their artifacts are found.
    results = summarise(pipeline.run(), pipeline.config, pipeline.data, pipeline.computing.device)
    directory.write_json(RESULTS, results)
    try:
        if rank() == 0:
            order_events(directory.path / METRICS, partial(place_of, pipeline))
            write_report(directory.path)
    except ValueError as error:
        raise ConfigError(f"{REPORT} was not written, all other files were: {error}") from error
    return results
