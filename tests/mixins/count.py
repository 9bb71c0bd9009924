"""Run the mixins on our models and on three of transformers, and count the outcomes.

`make test-transformers` runs it. Writes evals/results/transformers-tests.json. The exit status is 1 if a test
of ours failed. Slow tests run too (RUN_SLOW=1), because the tests of export and compilation are slow.
"""

import collections
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from minrnn.common.files import write_json
from minrnn.evals.record import command_line, commit, versions

FOLDER = Path(__file__).parent
RESULT = FOLDER.parent.parent / "evals" / "results" / "transformers-tests.json"


class Outcomes:
    """A pytest plugin: the outcome of each test, by its node id, and why it was skipped."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.reasons: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test has failed if one of its reports did: set-up, call, tear-down, or a subtest's."""
        if self.outcomes.get(report.nodeid) == "failed" or (report.when != "call" and report.passed):
            return
        if report.skipped and type(report) is not pytest.TestReport:  # a subtest: the others decide
            return
        self.outcomes[report.nodeid] = report.outcome
        if isinstance(report.longrepr, tuple):  # of a skipped test: path, line, reason
            self.reasons[report.nodeid] = str(report.longrepr[2]).removeprefix("Skipped: ")

    def by_class(self) -> dict[str, Any]:
        """Counts of passed and skipped tests, names of the failed, counts of the reasons to skip."""
        classes: dict[str, Any] = {}
        for node, outcome in self.outcomes.items():
            name, test = node.split("::")[-2:]
            empty = {"passed": 0, "failed": [], "skipped": 0, "reasons": collections.Counter()}
            entry = classes.setdefault(name.removeprefix("Test"), empty)
            if outcome == "failed":
                entry["failed"].append(test)
            else:
                entry[outcome] += 1
            if outcome == "skipped":
                entry["reasons"][self.reasons[node]] += 1
        for entry in classes.values():
            entry["reasons"] = dict(entry["reasons"].most_common())
        return classes


def main() -> None:
    """Run, count, print, write."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "RUN_SLOW": "1"}
    plugin = Outcomes()
    files = [str(FOLDER / name) for name in ("test_mixins.py", "peers.py")]
    pytest.main(
        ["-q", *files, "-o", "addopts=", "-W", "ignore", "--tb=line", "-p", "no:xdist"], plugins=[plugin]
    )
    models = plugin.by_class()
    for name, entry in models.items():
        passed, failed, skipped = entry["passed"], len(entry["failed"]), entry["skipped"]
        print(f"{name:16} passed {passed:4} failed {failed:3} skipped {skipped:4}")
    command = command_line("make test-transformers", ())
    record = {"command": command, "commit": commit(), "versions": versions(), "models": models}
    write_json(RESULT, record)
    sys.exit(any(entry["failed"] for name, entry in models.items() if name.startswith("Min")))


if __name__ == "__main__":
    main()
