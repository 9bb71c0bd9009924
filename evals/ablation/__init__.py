"""Ablations: what each change to a base recipe does, in paired differences over seeds.

`measure.py` makes a row for each variant from the finished runs of a sweep; `show.py` makes a table, a figure
and text from the rows.
"""
