"""
Compares the evaluation with the plain harness, by `python -m evaluation.compare`: the time, and whether the scores are the same.

    python -m benchmarks.evaluation --data ../shared/data/eval
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from common.files import read_json
from common.package import ROOT

from .measure import SHARED, options, report


def main():
    parser = options(__doc__, rounds=3)
    parser.add_argument("--data", type=Path, default=SHARED / "eval")
    parser.add_argument("--limit", type=int, default=32, help="questions of each task (32)")
    args = parser.parse_args()
    if not args.data.is_dir():
        raise SystemExit(f"{args.data} is missing: pass the folder with the data sets as --data.")
    if args.quick:
        args.limit, args.rounds = 2, 1
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "evaluation.compare", "--data", str(args.data.resolve())]
        command += ["--limit", str(args.limit), "--rounds", str(args.rounds), "--output", f"{folder}/figures.json"]
        subprocess.run(command, cwd=ROOT, check=True)
        report(read_json(Path(folder, "figures.json")), args.output)


if __name__ == "__main__":
    main()
