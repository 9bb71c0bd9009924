"""A model to the Hugging Face hub, in one commit. Imports nothing, since the recipe needs its settings.

    settings.py   push.repo, push.every, ...
    target.py     the repository: token and right to write, and whether what is there may be replaced
    files.py      the files of a push: model, card, training record
    commit.py     one commit of all of them
    beside.py     pushes of checkpoints while a run trains; worker.py is their process
    errors.py     the hub's errors as messages

Only main processes call these.
"""
