"""The version of the format of an export: `export_format` in its config.json.

| format | written by | what it adds |
|---|---|---|
| 1 | 0.1, and later commits; config.json does not name it | |
| 2 | now | `export_format`; `num_tokens`: the rows of the vocabulary after them are padding |

A format is a new one if code for an older one would load the export without an error and compute something
else. New settings and new cells are no new format: unknown ones are errors.
"""

EXPORT_FORMAT = 2


def check_export_format(export_format: object) -> None:
    """Check that this version reads an export.

    Args:
        export_format: the value in its config.json; None for none, which is format 1.

    Raises:
        ValueError: it is of a later format, or no format.
    """
    if export_format is None:
        return
    if not isinstance(export_format, int) or isinstance(export_format, bool) or export_format < 1:
        raise ValueError(f"export_format: must be an integer of at least 1, not {export_format!r}")
    if export_format > EXPORT_FORMAT:
        raise ValueError(
            f"export_format: is {export_format}, and this version of minrnn reads up to {EXPORT_FORMAT}; "
            "upgrade minrnn, or load the model with trust_remote_code=True where minrnn is not imported"
        )
