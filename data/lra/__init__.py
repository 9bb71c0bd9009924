"""Long Range Arena: labelled examples, made or converted once, then read in seeded order.

data.corpus lra/NAME, data.task {option: value} -> LabelledTask -> cache -> LabelledReader -> batches
"""

from .cache import LabelledData, cache_folder, open_data
from .reader import LabelledBatch, LabelledReader, LabelledSet
from .task import GeneratedTask, LabelledTask
from .tasks import Image, ListOps, Pathfinder, PathX, Retrieval, Text

LRA_TASKS: dict[str, type[LabelledTask]] = {
    task.NAME: task for task in (ListOps, Text, Retrieval, Image, Pathfinder, PathX)
}

__all__ = [
    "LRA_TASKS",
    "GeneratedTask",
    "LabelledBatch",
    "LabelledData",
    "LabelledReader",
    "LabelledSet",
    "LabelledTask",
    "cache_folder",
    "open_data",
]
