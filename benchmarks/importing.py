"""What ``import nord_snn`` costs beside what it stands on, in user seconds: ``python benchmarks/importing.py``.

New processes take turns, so that what else the machine does meets both.
"""

import resource
import statistics
import subprocess
import sys

BASE = "import torch; from spikingjelly.activation_based import neuron"
OURS = "import nord_snn, nord_snn.neurons, nord_snn.layers"
TURNS = 11


def user_seconds(code: str) -> float:
    """User time of a new process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, "-c", code], check=True)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def main() -> None:
    """Measure and print."""
    user_seconds(OURS)  # writes the bytecode
    pairs = [(user_seconds(BASE), user_seconds(OURS)) for _ in range(TURNS)]
    base, ours = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratios = sorted(b / a for a, b in pairs)
    print(f"{BASE}\n    {base:.2f} s\n{OURS}\n    {ours:.2f} s")
    print(f"{statistics.median(ratios):.2f} times as long ({ratios[0]:.2f} to {ratios[-1]:.2f} in {TURNS} pairs)")


if __name__ == "__main__":
    main()
