"""Compare the CPU time of ``import nord_snn`` with that of its dependencies: ``python benchmarks/importing.py``.

``import nord_snn`` imports torch and SpikingJelly. The script prints its user CPU time divided by that of importing torch and
SpikingJelly alone. Each import runs in a new process, and both imports alternate, so that other load affects them equally.
"""

import resource
import statistics
import subprocess
import sys

BASE = "import torch; from spikingjelly.activation_based import neuron"
OURS = "import nord_snn, nord_snn.neurons, nord_snn.layers"
N_PAIRS = 11


def user_seconds(code: str) -> float:
    """Return the user CPU time of a new process that runs ``code``."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, "-c", code], check=True)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def main() -> None:
    """Measure pairs of imports and print medians and ratios."""
    user_seconds(OURS)  # writes the bytecode of all modules
    pairs = [(user_seconds(BASE), user_seconds(OURS)) for _ in range(N_PAIRS)]
    base, ours = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratios = sorted(b / a for a, b in pairs)
    print(f"{BASE}\n    {base:.2f} s\n{OURS}\n    {ours:.2f} s")
    print(
        f"{statistics.median(ratios):.2f} times the CPU time ({ratios[0]:.2f} to {ratios[-1]:.2f} in {N_PAIRS} pairs)"
    )


if __name__ == "__main__":
    main()
