"""Scaling laws, and the check of a ladder's rules: `minrnn fit`.

points.py      the points of a fit: from a CSV, from runs, from a sweep
law.py         L(N, D), its fit, what it says about compute
resample.py    intervals by resampling runs; the error on the largest run
compare.py     two laws: which is lower, and where they cross
words.py       what the data can and cannot support, in a paragraph
figure.py      the figure
rates.py       the rule of the learning rate against a measured grid
command.py     `minrnn fit`
"""
