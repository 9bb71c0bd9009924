"""A search: Optuna draws the settings of each run when it begins, from the results of the runs before it.

    lease of a run -> its trial, created with the run's name -> settings drawn, stored -> training -> result

The study is a journal in the sweep's folder (Optuna's JournalFileBackend), which all workers append to. The
worker that holds a run's lease creates the run's trial in one line of the journal, and its settings are in
the journal before training starts. So a run that was stopped or killed goes on with the settings that were
drawn for it, and no trial exists without a run.

The sampler of run i is seeded by (seed, i). What `random` draws depends on these only; what `tpe` draws also
depends on the results that are known when a run begins. So one worker repeats a search exactly, and several
may not.
"""

import json
import logging
import math
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ...common.errors import missing_package_error
from ...evals.output import table
from ...evals.scaling.points import held_out_loss
from .spec import Range, Search

JOURNAL = "study.journal"
STUDY = "sweep"
NAME = "run"  # attribute of a trial: its run
NUM_BEST = 5  # runs in the summary


def check_optuna() -> None:
    """Check that Optuna is installed.

    Raises:
        UserError: it is not.
    """
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise missing_package_error("search", "optuna", "search") from None


class Study:
    """The settings and results of a search, as the workers of one process see them.

    Args:
        folder: of the sweep.
        search: its field `search`.
        numbers: of each run, by name.
    """

    def __init__(self, folder: Path, search: Search, numbers: dict[str, int]):
        import optuna
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self.folder, self.search, self.numbers = folder, search, numbers
        self._lock = threading.Lock()
        self._storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
        optuna.create_study(storage=self._storage, study_name=STUDY, load_if_exists=True)

    def settings(self, name: str) -> dict[str, Any]:
        """The settings of a run: those of its trial, which is created if there is none.

        Only the worker that holds the run's lease may call this.
        """
        import optuna

        with self._lock:
            study = self._load(self._sampler(self.numbers[name]))
            found = self._trial(study, name)
            if found is None:
                new = optuna.trial.create_trial(
                    state=optuna.trial.TrialState.RUNNING, user_attrs={NAME: name}
                )
                study_id = self._storage.get_study_id_from_name(STUDY)
                found = self._storage.get_trial(self._storage.create_new_trial(study_id, new))
            if found.state.is_finished():
                return self._values(found.params)
            trial = optuna.trial.Trial(study, found._trial_id)
            drawn = {key: _suggest(trial, key, among) for key, among in self.search.settings.items()}
            return self._values(drawn)

    def record(self, name: str, has_failed: bool) -> None:
        """Record how a run ended, unless that is recorded. A run that failed counts as the worst: an unstable
        setting must not be drawn again and again.

        Only the worker that holds the run's lease may call this.
        """
        with self._lock:
            study = self._load(None)
            trial = self._trial(study, name)
            # None: the run failed before it was drawn. Finished: a worker that was killed then recorded it.
            if trial is None or trial.state.is_finished():
                return
            loss = None if has_failed else held_out_loss(self.folder / "runs" / name)
            study.tell(trial.number, math.inf if loss is None else loss)

    def summary(self) -> str:
        """A table of the best runs with their settings."""
        with self._lock:
            trials = self._load(None).get_trials(deepcopy=False)
        finished = [trial for trial in trials if trial.state.is_finished() and math.isfinite(trial.value)]
        best = sorted(finished, key=lambda trial: trial.value)[:NUM_BEST]
        rows = [
            {
                "run": trial.user_attrs[NAME],
                "held out": f"{trial.value:.4f}",
                **{key: _text(value) for key, value in self._values(trial.params).items()},
            }
            for trial in best
        ]
        if not rows:
            return "no run of the search has a result"
        columns = {column: lambda row, column=column: row[column] for column in rows[0]}
        return table(rows, columns, f"the best of {len(finished)} runs")

    def _load(self, sampler: Any) -> Any:
        import optuna

        return optuna.load_study(study_name=STUDY, storage=self._storage, sampler=sampler)

    def _trial(self, study: Any, name: str) -> Any:
        """The trial of a run, as Optuna's FrozenTrial; None if there is none."""
        for trial in study.get_trials(deepcopy=False):
            if trial.user_attrs.get(NAME) == name:
                return trial
        return None

    def _sampler(self, number: int) -> Any:
        from optuna.samplers import RandomSampler, TPESampler

        seed = int(np.random.SeedSequence([self.search.seed, number]).generate_state(1)[0])
        if self.search.sampler == "random":
            return RandomSampler(seed)
        # constant_liar: runs that are being trained count as bad, so workers do not draw the same.
        return TPESampler(
            seed=seed, n_startup_trials=self.search.startup, multivariate=True, constant_liar=True
        )

    def _values(self, drawn: dict[str, Any]) -> dict[str, Any]:
        """Values of a trial's parameters: choices are stored as JSON."""
        is_range = {key: isinstance(among, Range) for key, among in self.search.settings.items()}
        return {key: value if is_range[key] else json.loads(value) for key, value in drawn.items()}


def _suggest(trial: Any, key: str, among: Range | list[Any]) -> Any:
    if not isinstance(among, Range):
        return trial.suggest_categorical(key, [json.dumps(value) for value in among])
    if among.integer:
        return trial.suggest_int(key, round(among.low), round(among.high), log=among.log)
    return trial.suggest_float(key, among.low, among.high, log=among.log)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
