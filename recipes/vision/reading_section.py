"""The fields of a configuration that say how pictures are read, which change no result."""

from pydantic import Field

from ..experiment.configuration import Section
from .sources.loading import Storage


class ReadingSection(Section):
    """Where pictures lie, and who reads them when."""

    root: str = Field(default="data", description="folder of downloaded sets")
    download: bool = Field(default=True, description="fetch a set that is not below root, where the network allows it")
    storage: Storage = Field(
        default="auto",
        description="files read into memory at the start, or streamed, read when they are needed; auto: streamed where "
        "they have more than 32 MiB. Batches are the same to the bit",
    )
    num_workers: int | None = Field(
        default=None,
        ge=0,
        le=512,
        description="processes that read and crop streamed images, for all stages together; 0: this process does; "
        "null: one fewer than there are cores, shared by the processes on this machine",
    )


HOW_READ = frozenset(ReadingSection.model_fields)
"""Their names."""
