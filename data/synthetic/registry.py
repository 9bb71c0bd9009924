"""The synthetic tasks by name."""

from .distance import DistantKey, DistantRegister
from .formal import (
    BinaryMissingDuplicate,
    BucketSort5,
    BucketSort10,
    CycleNavigation,
    EvenPairs,
    Majority,
    MajorityCount,
    MissingDuplicate9,
    Parity,
)
from .recall import InductionHeads, MultiQueryRecall, Needle, SelectiveCopying
from .task import Task

SYNTHETIC_TASKS: dict[str, type[Task]] = {
    "selective-copying": SelectiveCopying,
    "even-pairs": EvenPairs,
    "parity": Parity,
    "cycle-navigation": CycleNavigation,
    "missing-duplicate": BinaryMissingDuplicate,
    "missing-duplicate-9": MissingDuplicate9,
    "bucket-sort-5": BucketSort5,
    "bucket-sort-10": BucketSort10,
    "majority": Majority,
    "majority-count": MajorityCount,
    "mqar": MultiQueryRecall,
    "induction-heads": InductionHeads,
    "needle": Needle,
    "distant-key": DistantKey,
    "distant-register": DistantRegister,
}
