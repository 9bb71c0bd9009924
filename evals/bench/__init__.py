"""Speed and memory of ours and the peers in one run: `minrnn bench scan|train|generate|data`.

    command.py      the command line
    measure.py      turns in rotation, ceilings, and reasons why a contender cannot run
    worker.py       a contender in a process of its own
    record.py       the JSON file and the plot
    scan.py         the recurrence alone                     contenders in scan_peers.py
    train.py        a whole training step                    models in language_models.py
    generate.py     reading a context and decoding after it  decoders in decoders.py
    data.py         the data path

Every number is relative to a peer or to the machine's own copy, `torch.add` or matrix product. All are
measured in the same run, in rotation (so other load slows all of them), warmed up, over several rounds.
Results are medians; the file holds every round.

At import time, only errors, `pipeline.machine` and `pipeline.options` are imported from data and training
code. So a machine with torch, transformers, numpy, psutil, matplotlib and tqdm is enough for all but
`bench data` and `bench train --loop`.
"""
