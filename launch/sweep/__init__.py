"""Sweeps: `minrnn sweep`.

spec.py      SWEEP.yaml
rules.py     the rules of a ladder: learning rate, batch, warmup, depth, decay by size
expand.py    the runs of a sweep, with their settings
plan.py      sizes, FLOPs and estimated time; sweep.json in the sweep's folder
checks.py    what would stop every run, found before the first
search.py    settings that Optuna draws when a run begins
parent.py    the MLflow run in which a sweep's runs are nested
leases.py    who trains what: files in the folder that all workers share
branch.py    a decay that starts from the checkpoint of a longer run
runner.py    the workers
progress.py  the state of each run as a table
command.py   `minrnn sweep`
"""
