"""A hub on this machine as the hub of this process."""

import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from local_hub import LocalHub


def use_hub(hub: LocalHub, patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make a hub that of this process and of those that it starts. The client does not wait between tries."""
    for name, value in hub.environment().items():
        patch.setenv(name, value)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    impatient = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    patch.setattr("huggingface_hub.utils._http.time", impatient)
    huggingface_hub.close_session()
