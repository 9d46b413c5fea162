"""What `import ghn_init` adds to `import torch`, in fresh interpreters. The aim: at most 100 ms.

Run: `python benchmarks/import_time.py [repetitions]`
"""

from __future__ import annotations

import statistics
import subprocess
import sys

TIMER = """
import time
{before}
started = time.perf_counter()
{statement}
print(1000 * (time.perf_counter() - started))
"""


def milliseconds(statement: str, before: str) -> float:
    """Time of `statement` in a new process that has run `before`."""
    code = TIMER.format(statement=statement, before=before)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    cases = {
        "import torch": ("import torch", ""),
        "import ghn_init, after torch": ("import ghn_init", "import torch"),
        "first use of ghn_init.predict, after that": ("ghn_init.predict", "import torch, ghn_init"),
        "the command line without a command": ("import ghn_init.cli", ""),
    }
    for name, (statement, before) in cases.items():
        times = [milliseconds(statement, before) for _ in range(repetitions)]
        middle, worst = statistics.median(times), max(times)
        print(f"{name:42} median {middle:7.1f} ms, max {worst:7.1f} ms, n = {repetitions}")


if __name__ == "__main__":
    main()
