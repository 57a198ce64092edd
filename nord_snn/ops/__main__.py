"""``python -m nord_snn.ops``: the backends, and for each whether it runs here or why not."""

from nord_snn.ops.associative_lif.autograd import IMPLEMENTATIONS
from nord_snn.ops.dispatch import BACKENDS


def table() -> str:
    """One line a backend: name, the device it is for, whether it runs, and the version or the reason."""
    lines = [("backend", "device", "runs", "")]
    for name in BACKENDS:
        backend = IMPLEMENTATIONS[name]
        runs, reason = backend.available()
        lines.append((name, backend.device, "yes" if runs else "no", reason))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]]).rstrip()
        for line in lines
    )


if __name__ == "__main__":
    print("associative_lif, slowest first; backend='auto' takes the last one that runs on the tensor's device\n")
    print(table())
