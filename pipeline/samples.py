"""samples.txt: texts that the model generates, during training (eval.samples_every) and at its end."""

from collections.abc import Sequence

from .folder import RunFolder


def write_samples(folder: RunFolder, final: Sequence[tuple[str, str]] = ()) -> None:
    """Write samples.txt anew: the samples in metrics.jsonl in order of their steps, then those of the end.

    Args:
        final: (prompt, text) of the finished model.
    """
    blocks = [
        f"=== step {entry['step']}, prompt {pair['prompt']!r}\n{pair['text']}\n\n"
        for entry in folder.metrics.history.update().of_kind("samples")
        for pair in entry["samples"]
    ]
    blocks += [f"=== prompt {prompt!r}\n{text}\n\n" for prompt, text in final]
    (folder.path / "samples.txt").write_text("".join(blocks))
