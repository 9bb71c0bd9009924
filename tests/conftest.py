"""Settings every test runs under."""

import signal

import torch
from hypothesis import HealthCheck, Phase, settings

# `nohup` and a shell's `&` leave these ignored, and the processes that tests start would inherit that.
for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, default)

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
