"""Kill a sweep's workers at random moments: `python tests/soak/sweep.py`.

Two workers train a ladder of two sizes, two families and three budgets, with branches. At random moments a
worker, its training, or both get SIGKILL, and a worker is started in its place. At the end every run must be
done once, have begun no step again that was saved, and be equal to the run of an undisturbed sweep to the
bit: losses, validations and weights. Writes the results; the exit status is 1 if anything differs.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from results import origin, soak_parser

sys.path.insert(0, str(Path(__file__).parents[1] / "shared"))
from killed_sweep import KilledSweep, differences, start, start_steps, write_sweep

from minrnn.common.files import write_json

LADDER: dict[str, Any] = {
    "sizes": ["12k", "24k"],
    "families": {"minGRU": {}, "minLSTM": {"model.cell": "minlstm"}},
}


def main() -> int:
    """Train disturbed and undisturbed, compare, write the results. Returns the exit status."""
    parser = soak_parser(
        "python tests/soak/sweep.py", "Kill a sweep's workers.", "the kills", "soak-sweep.json"
    )
    parser.add_argument("--kills", type=int, default=20, help="of workers and runs (default: %(default)s)")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="minrnn-sweep-"))
    out, undisturbed = folder / "killed", folder / "undisturbed"
    killed = KilledSweep(write_sweep(folder / "killed.yaml", out, **LADDER), out, arguments.seed)
    try:
        killed.run(arguments.kills)
    finally:
        killed.end()
    direct = write_sweep(folder / "undisturbed.yaml", undisturbed, **LADDER)
    if start(direct, folder / "undisturbed.log").wait() != 0:
        raise RuntimeError(f"the undisturbed sweep failed: {folder / 'undisturbed.log'}")
    problems = differences(out, undisturbed)
    names = sorted(path.name for path in (out / "runs").iterdir())
    results = {
        "kind": "sweep soak",
        "command": f"python tests/soak/sweep.py --kills {arguments.kills} --seed {arguments.seed}",
        "kills": killed.kills.total(),
        "faults": dict(killed.kills),
        "runs": len(names),
        "starts": sum(len(start_steps(out / "logs" / f"{name}.log")) for name in names),
        "problems": problems,
        **origin(),
    }
    write_json(arguments.out, results)
    print("\n".join([*problems, f"{results['kills']} kills, {len(problems)} problems; {arguments.out}"]))
    if problems or results["kills"] < arguments.kills:
        print(f"the sweeps are in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
