"""Outages of the Hugging Face hub, and names that are no dataset of it.

Retries of `datasets` are turned off in favour of those of outages.py, which announce an outage once, respect
data.retries and what the server asks for, and go on at the row after the last one.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ..common.errors import UserError
from ..common.names import did_you_mean, nearest_names
from .outages import Announcements, Attempts, RetryPolicy, classify

T = TypeVar("T")
NAME_TIMEOUT = 10.0  # seconds until the hub answers whether it has a dataset


@functools.cache
def set_up_hub(timeout: float) -> None:
    """Set the time-out of the hub's client, and turn the retries of `datasets` (5.2) off."""
    import datasets.config
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT = max(round(timeout), 1)
    huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT = max(round(timeout), 1)
    for kind in ("READ", "OPEN"):
        setattr(datasets.config, f"STREAMING_{kind}_MAX_RETRIES", 1)
        setattr(datasets.config, f"STREAMING_{kind}_RETRY_INTERVAL", 0)
    datasets.config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 0
    datasets.config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 0


def retry_outages(function: Callable[[], T], name: str, policy: RetryPolicy) -> T:
    """Return `function()`, retried after errors that may pass.

    Raises:
        RemoteError: the last retry failed, too.
        Others: errors of the function that cannot pass.
    """
    attempts = Attempts(name, policy, Announcements())
    while True:
        try:
            return function()
        except Exception as error:
            if not classify(error).may_pass:
                raise
            attempts.failed(error)


def retried_rows(dataset: Any, name: str, policy: RetryPolicy) -> Iterator[Any]:
    """The rows of a streamed dataset from its state on. After an outage it goes on at the row that failed.

    Raises:
        RemoteError: the outage lasts longer than the policy allows, or the error cannot pass.
    """
    attempts = Attempts(name, policy, Announcements())
    rows = iter(dataset)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # datasets, the hub's client and pyarrow each raise their own
            state = dataset.state_dict()
            attempts.failed(error)
            dataset.load_state_dict(state)
            rows = iter(dataset)
            continue
        attempts.succeeded()
        yield row


def check_dataset_name(name: str, policy: RetryPolicy) -> None:
    """Ask the hub whether it has a dataset, before `datasets` does so with many requests and waits.

    A name without a slash may be a mistyped path, so an outage is not waited for.

    Raises:
        UserError: the hub has no such dataset, or cannot be asked.
    """
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    is_path = "/" not in name
    policy = replace(policy, retries=0) if is_path else policy
    api, timeout = huggingface_hub.HfApi(), min(policy.timeout, NAME_TIMEOUT)
    try:
        retry_outages(lambda: api.dataset_info(name, timeout=timeout), f"the dataset {name}", policy)
        return
    except GatedRepoError:  # opening it says what to do
        return
    except HfHubHTTPError as error:
        if classify(error).status not in (401, 404):  # opening it says what is wrong
            return
        problem = "and no dataset of that name on the hub, or it is private (hf auth login)"
    except Exception as error:  # an outage, or a host that does not exist
        reason = classify(error.__cause__ or error).reason
        problem = f"and the hub cannot be asked for a dataset of that name: {reason}"
    nearest = nearest_names(name, (path.name for path in Path().iterdir()), count=2)
    advice = did_you_mean(nearest, otherwise="write a path in full, a dataset as USER/NAME")
    raise UserError(
        "data.corpus", f"there is no file or folder {name} in {Path.cwd()}, {problem} ({advice})"
    ) from None
