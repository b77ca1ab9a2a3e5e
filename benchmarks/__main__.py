"""
Runs the benchmarks one after another, each in a separate process, and writes figures, tables and plots.

    python -m benchmarks                    # all of them: an hour, 40 GB of disk and 16 GB of memory for the 6B shape
    python -m benchmarks decode rounds      # some of them
    python -m benchmarks --quick            # a smoke test with one layer and short texts: 3 minutes

Figures go to benchmarks/results, to a folder for each CPU, plots and tables to docs/; with --quick to
build/benchmarks/quick instead.
"""

import re
import subprocess
import sys
from pathlib import Path

from common.options import Parser
from common.package import ROOT

from .measure import SHARED, cpu_name


NAMES = [
    "tokenizer",
    "quantization_quality",
    "decode",
    "attention",
    "prompts",
    "rounds",
    "batching",
    "serving",
    "soak",
    "training",
    "evaluation",
]
NEED_DATA = ["tokenizer", "quantization_quality", "evaluation", "serving"]  # texts that are not part of this repository


def main():
    parser = Parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(NAMES)}; all of them by default")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--work", type=Path, default=ROOT / "build/benchmarks", help="where weights are written")
    args = parser.parse_args()
    unknown = set(args.names) - set(NAMES)
    if unknown:
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}: choose from {', '.join(NAMES)}")
    results, docs = ROOT / "benchmarks/results", ROOT / "docs"
    if args.quick:
        results = docs = args.work / "quick"
    failed = []
    for name in args.names or NAMES:
        if name in NEED_DATA and not SHARED.is_dir():
            print(f"{name} is left out: its texts are not at {SHARED}.", file=sys.stderr)
            continue
        print(f"== {name}", file=sys.stderr, flush=True)
        file = results / re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()) / f"{name}.json"
        command = [sys.executable, "-m", f"benchmarks.{name}", "--output", str(file)]
        command += ["--work", str(args.work), *(["--quick"] if args.quick else [])]
        if subprocess.run(command, cwd=ROOT).returncode:
            failed.append(name)
    command = [sys.executable, "-m", "benchmarks.present", "--results", str(results), "--docs", str(docs)]
    if subprocess.run(command, cwd=ROOT).returncode:
        failed.append("present")
    if failed:
        raise SystemExit(f"Failed: {', '.join(failed)}. What they printed is above.")


if __name__ == "__main__":
    main()
