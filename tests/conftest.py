"""Settings every test runs under."""

import torch
from hypothesis import HealthCheck, Phase, settings

torch.set_num_threads(1)  # pytest -n runs several processes, and tiny tensors gain nothing
settings.register_profile(
    "minrnn",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[phase for phase in Phase if phase is not Phase.explain],
)
settings.load_profile("minrnn")
