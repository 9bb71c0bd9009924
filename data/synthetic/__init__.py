"""Synthetic tasks as corpora: seeded examples with a small vocabulary, scored where the answer is expected.

data.corpus synthetic/NAME, data.task {option: value} -> Task -> examples -> chunks
"""

from .reader import IN_DISTRIBUTION, TaskReader, TaskValidation
from .registry import SYNTHETIC_TASKS
from .stream import StreamTaskReader
from .task import Task

__all__ = [
    "IN_DISTRIBUTION",
    "SYNTHETIC_TASKS",
    "StreamTaskReader",
    "Task",
    "TaskReader",
    "TaskValidation",
]
