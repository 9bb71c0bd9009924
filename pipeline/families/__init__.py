"""Families of models (`model.family`): ours, torch's GRU and LSTM, and every causal model of transformers.

registry.py   the names, what is known about each, and the fields of their configurations
sizes.py      the size of a model with a given number of parameters
build.py      configuration and model of a recipe
adapter.py    the call that the training loop makes, for models of transformers
limits.py     what a model cannot do, measured
"""
