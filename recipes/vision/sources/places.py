"""Where a run may write: not among the images that it reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...experiment.errors import ConfigError
from ...experiment.folder.paths import lies_in, user_path
from ...experiment.folder.run_folder import RunDirectory
from .label_file import LABEL_FILE
from .loading import FOLDER_PREFIX


def check_places(places: Mapping[str, Path], sources: Mapping[str, str]) -> None:
    """Refuse to write where images are read from: what is written would be listed with them on the next start.

    Args:
        places: folders that will be written to, by their options.
        sources: of images, by their fields.

    Raises:
        ConfigError: one lies in a folder of images, by whatever way its path leads there, or is a file.
    """
    for option, place in places.items():
        if place.exists() and not place.is_dir():
            raise ConfigError(f"{option}: {place} is a file; name a folder")
        for field, source in sources.items():
            folder = user_path(source.removeprefix(FOLDER_PREFIX)) if source.startswith(FOLDER_PREFIX) else None
            # With a table, the images that it lists are read alone.
            if folder is None or (folder / LABEL_FILE).is_file() or not lies_in(place, folder):
                continue
            started = RunDirectory(place, frozenset(), frozenset()).started
            moved = " The run that is there goes on with --resume once it is moved out" if started else ""
            raise ConfigError(
                f"{option}: {place} lies in {folder}, whose folders {field} reads as images: what a run writes there "
                f"would be read with them. Name a folder outside of it.{moved}"
            )
