"""Seconds that `diffopd --help` takes, the median and the quickest of several starts.

python scripts/bench_help.py [--repeats 5] [--json]
"""

import json
import statistics
import subprocess
import sys
import time
from typing import Annotated

import typer


def main(
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a sentence")] = False,
) -> None:
    """Measure."""
    seconds = []
    for _ in range(repeats):
        start = time.monotonic()
        subprocess.run([sys.executable, "-m", "diffopd.cli", "--help"], stdout=subprocess.DEVNULL, check=True)
        seconds.append(time.monotonic() - start)
    figures = {"median": statistics.median(seconds), "quickest": min(seconds), "repeats": repeats}
    sentence = f"diffopd --help: {figures['median']:.2f} s (median of {repeats}), {figures['quickest']:.2f} s at best"
    print(json.dumps(figures) if as_json else sentence)


if __name__ == "__main__":
    typer.run(main)
