"""A task whose scoring fails."""


def process_results(doc: dict, results: list) -> dict:
    raise RuntimeError("this task is broken")
