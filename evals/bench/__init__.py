"""Speed and memory, ours beside the peers', in one run: `minrnn bench scan|train|generate|data`.

    command.py      the command line
    measure.py      turns in rotation, ceilings, memory, and why a contender cannot run
    worker.py       a contender in a process of its own, so that its memory is its own
    record.py       the JSON, the table, the plot's frame
    scan.py         the recurrence alone                     contenders in scan_peers.py
    train.py        a training step, whole                   models in language_models.py
    generate.py     reading a context and decoding after it  decoders in decoders.py
    data.py         the data path

No number here stands alone. Each is a ratio to a peer or to the machine's own copy, `torch.add` or matrix product, all measured in the same
run, in rotation (a busy neighbour then slows everybody), warmed up, several rounds, medians; the file keeps every round.

Nothing here imports our data or training code at import time (but its errors and `pipeline.machine`), so a machine with torch, transformers,
numpy, matplotlib and tqdm is enough for all but `bench data`.
"""
