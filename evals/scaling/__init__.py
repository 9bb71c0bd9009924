"""Scaling laws: `minrnn fit`.

points.py      the points of a fit: from a CSV, from runs, from a sweep
law.py         L(N, D), its fit, what it says about compute
resample.py    intervals by resampling runs; the error on the largest run
compare.py     two laws: which is lower, and where they cross
words.py       what the data can and cannot support, in a paragraph
figure.py      the figure
command.py     `minrnn fit`
"""
