"""Compare the times of kernels with their references, other libraries and a lower bound: ``python benchmarks/run.py``.

Before each table the outputs and gradients are compared with the reference. Tables are printed and written to
``docs/benchmarks.md`` with machine and versions. With a CUDA GPU, GPU tables are added.
"""

import argparse
import datetime
import gc
import importlib.metadata
import platform
from pathlib import Path

import decoding
import language_model
import monitor
import neurons
import resonance
import stdp
import torch
from language_model import keep_freed_memory
from timing import Row, copy_bandwidth, peak_bytes, time_in_processes, time_in_turns

from nord_snn._compat.torch import allow_recompilations

OUT = Path(__file__).parents[1] / "docs" / "benchmarks.md"
CPU_NEURONS = (((10, 1024, 128), 16), ((10, 2048, 512), 64))
GPU_NEURONS = ((10, 65536, 512), 64)


class Page:
    """Text of the page: each line is printed when it is added; the caller writes ``text`` to a file at the end."""

    def __init__(self) -> None:
        self.text = ""

    def add(self, text: str = "") -> None:
        """Print and append one or several lines."""
        print(text, flush=True)
        self.text += text + "\n"

    def table(self, rows: list[Row], baseline: str, bound_ms: float, bound: str) -> None:
        """Add a table of the rows, fastest last, and of the lower bound.

        Args:
            rows: times of the implementations, the baseline first.
            baseline: name of the baseline in the header.
            bound_ms: lower bound of the time in milliseconds.
            bound: what the lower bound is.
        """
        self.add(f"| | ms | times as fast as the {baseline} |\n|---|---|---|")
        for row in sorted(rows, key=lambda row: -row.milliseconds):
            self.add(f"| {row.name} | {row.milliseconds:.2f} | {row.speedup:.1f} |")
        self.add(f"| lower bound: {bound} | {bound_ms:.2f} | {rows[0].milliseconds / bound_ms:.1f} |\n")


def machine() -> str:
    """Return processor, threads, GPU, library versions and date."""
    names = ("torch", "numba", "triton", "cupy-cuda12x", "cupy-cuda13x", "spikingjelly", "snntorch", "numpy")
    versions = []
    for name in names:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = lines[0].split(":")[1].strip() if lines else processor
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{processor} ({capability}), {torch.get_num_threads()} threads{gpu}; Python {platform.python_version()}, "
        f"{', '.join(versions)}; {datetime.date.today().isoformat()}"
    )


def neuron_tables(
    page: Page, shape: tuple[int, int, int], n_clusters: int, dtype: torch.dtype, device: str, seconds: float
) -> None:
    """Add the tables of one shape: forward, then forward and backward."""
    inputs = neurons.make_inputs(shape, n_clusters, dtype, device)
    x = inputs["x"]
    page.add(f"### Neuron, x {list(shape)}, {n_clusters} clusters, {str(dtype).removeprefix('torch.')}, {device}\n")
    page.add(f"Correctness check: {neurons.check(inputs)}.\n")
    for backward in (False, True):
        rows = time_in_turns(neurons.implementations(inputs, backward), seconds)
        moved = neurons.bytes_moved(x, backward)
        bound_ms = 1e3 * moved / copy_bandwidth(device, x.numel() * x.element_size())
        page.add("Forward and backward:\n" if backward else "Forward without gradient:\n")
        page.table(rows, "plain loop", bound_ms, f"{moved / 1e6:.0f} MB at the copy bandwidth")
        torch.compiler.reset()
        gc.collect()


def resonance_tables(page: Page, seconds: float) -> None:
    """Add the times for the language model's shape and for a longer one, and memory by context length."""
    for T, B, S, D in ((10, 8, 128, 128), (10, 1, 1024, 128)):
        inputs = resonance.make_inputs(T, B, S, D)
        page.add(f"### Resonance, q and k [{T}, {B}, {S}, {D}], {resonance.HEADS} heads, top {resonance.TOP_K}\n")
        page.add(f"Correctness check: {resonance.check(inputs)}.\n\nForward and backward:\n")
        moved = resonance.bytes_moved(inputs)
        bound_ms = 1e3 * moved / copy_bandwidth("cpu", inputs["q"].numel() * 4)
        page.table(
            time_in_turns(resonance.implementations(inputs), seconds),
            "reference",
            bound_ms,
            f"{moved / 1e6:.0f} MB at the copy bandwidth",
        )
        torch.compiler.reset()
    page.add("Peak memory in forward and backward, MB, by context length S, q and k [4, 1, S, 64]:\n")
    lengths = (512, 1024, 2048, 4096)
    page.add("| S | " + " | ".join(map(str, lengths)) + " |\n|---|" + "---|" * len(lengths))
    for name in ("reference", "nord-snn, `torch`", "**nord-snn**"):
        peaks = [
            peak_bytes(resonance.implementations(resonance.make_inputs(4, 1, S, 64), compiled=False)[name]) / 1e6
            for S in lengths
        ]
        page.add(f"| {name} | " + " | ".join(f"{peak:.0f}" for peak in peaks) + " |")
    page.add()


def language_model_table(page: Page, seconds: float) -> None:
    """Add the table of one training step."""
    page.add("### Training step of the language model\n")
    page.add(f"{(language_model.__doc__ or '').strip()} Correctness check: {language_model.check()}.\n")
    page.add("Each implementation runs in its own process; the calls of the processes are interleaved.\n")
    *rows, bound = time_in_processes(language_model.implementations(), seconds)
    page.table(rows, "plain loop", bound.milliseconds, language_model.LOWER_BOUND)
    tokens = language_model.BATCH * language_model.LENGTH
    ours = next(row for row in rows if row.name.startswith("**"))
    page.add(
        f"{tokens * 1e3 / rows[0].milliseconds:.0f} tokens/s with the plain loop, "
        f"{tokens * 1e3 / ours.milliseconds:.0f} with nord-snn.\n"
    )


def monitor_table(page: Page, seconds: float) -> None:
    """Add the cost of counting spikes."""
    page.add("### Counting spikes\n")
    page.add(f"{(monitor.__doc__ or '').strip()} Correctness check: {monitor.check()}.\n")
    page.add("| | ms | times as fast as without |\n|---|---|---|")
    for row in time_in_processes(monitor.implementations(), seconds):
        page.add(f"| {row.name} | {row.milliseconds:.2f} | {row.speedup:.3f} |")
    page.add()


def stdp_table(page: Page, seconds: float) -> None:
    """Add the time of one update of each learning rule, and its peak memory."""
    pre, post = stdp.make_inputs()
    page.add(f"### STDP, {list(stdp.SHAPE)} -> {stdp.N_OUT}\n")
    page.add(f"{(stdp.__doc__ or '').strip()} Correctness check: {stdp.check(pre, post)}.\n")
    n_rows = stdp.SHAPE[1] * stdp.SHAPE[2]
    page.add(
        f"SpikingJelly's learner ran on {stdp.ROWS} of the {n_rows:,} rows; its times are extrapolated to all rows.\n"
    )
    rows = time_in_turns(stdp.implementations(pre, post), seconds)
    factor = n_rows / stdp.ROWS
    for row in rows:
        if row.name.startswith("SpikingJelly"):
            row.milliseconds *= factor
        else:
            row.speedup *= factor
    *rows, bound = rows
    page.table(rows, "first row", bound.milliseconds, stdp.LOWER_BOUND)
    page.add(
        "Peak memory, MB, by number of rows, [10, rows, 1, 512] -> 512 (one outer product per row would take 1 MB each):\n"
    )
    counts = (64, 256, 1024, 4096)
    page.add("| rows | " + " | ".join(map(str, counts)) + " |\n|---|" + "---|" * len(counts))
    for kind in (stdp.STDP, stdp.TripletSTDP):
        flat = [x.flatten(1, 2)[:, :, None] for x in (pre, post)]
        peaks = [peak_bytes(stdp.ours(kind, flat[0][:, :n], flat[1][:, :n])) / 1e6 for n in counts]
        page.add(f"| `{kind.__name__}` | " + " | ".join(f"{peak:.0f}" for peak in peaks) + " |")
    page.add()


def decoding_table(page: Page) -> None:
    """Add the decoding speed after a short and a long prompt, with and without the cache."""
    net = decoding.firing_model()
    page.add("### Decoding\n")
    page.add(
        f"{(decoding.__doc__ or '').strip()} The weights are random; the embedding is scaled until the firing rate of "
        "the input neurons is at least 10 %."
    )
    page.add(f"Correctness check: {decoding.check(net)}.\n")
    page.add("| prompt, tokens | cache | ms to the first token | ms a token | tokens/s |\n|---|---|---|---|---|")
    speeds = decoding.measure(net)
    for (length, use_cache), speed in speeds.items():
        name = "**yes**" if use_cache else "no"
        page.add(f"| {length} | {name} | {speed.first:.0f} | {speed.later:.1f} | {1e3 / speed.later:.2f} |")
    short, long = (speeds[length, True].later for length in decoding.PROMPT_LENGTHS)
    config = net.config
    float_bytes = config.num_hidden_layers * config.hidden_size * 4 * (config.t_fast + config.t_slow + 1)
    page.add(
        f"\nWith the cache a token takes {long / short:.2f} times as long after the longer prompt as after the shorter. "
        f"A position takes {decoding.cache_bytes(net):,} bytes of cache over all blocks; with key spikes as floats it would "
        f"take {float_bytes:,}.\n"
    )


def gpu_tables(page: Page, seconds: float) -> None:
    """Add the tables of the neuron on a GPU, or a note that there is no GPU."""
    page.add("## GPU\n")
    if not torch.cuda.is_available():
        page.add(
            "**Not measured.** No CUDA GPU was available when this page was written: the Triton and CuPy kernels are\n"
            "tested for correctness (in Triton's interpreter; the CUDA source is compiled for the GPU and run on the CPU)\n"
            'but not for speed. The section "Limits" of the README has measurements on one GPU at an earlier commit.\n'
            "On a machine with a GPU this section has tables of the neuron on the GPU."
        )
        return
    for dtype in (torch.bfloat16, torch.float32):
        neuron_tables(page, *GPU_NEURONS, dtype, "cuda", seconds)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=15.0, help="time to measure each table")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--only",
        choices=("neurons", "resonance", "stdp", "language-model", "monitor", "decoding", "gpu"),
        help="measure one part and write no file",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    allow_recompilations(64)
    keep_freed_memory()  # otherwise glibc's returning and mapping of pages dominates many of these times
    page = Page()
    page.add("# Benchmarks\n")
    page.add(
        "Written by `python benchmarks/run.py`. Times are milliseconds per call. The implementations of a table run in\n"
        "one process, in turns of a few calls that are interleaved; times and ratios are medians over the turns. Shapes\n"
        "are [time steps, rows, neurons] for neurons, [time steps, sequences, positions, features] for the others. The\n"
        "plain PyTorch loop is nord-snn's reference: PyTorch operations in a loop over time steps. The lower bound is\n"
        "the time to read the input and write the output once at the speed of a memory copy (copy bandwidth).\n\n"
        "SpikingJelly's and snnTorch's neurons compute less: they have no cascade and no refractory period, and `LIFNode`\n"
        "has no synaptic current. Freed memory is reused for the next call (`keep_freed_memory` in\n"
        "`examples/nord_lm/nordlm/training/runtime.py`). In the table of the training step three rows use PyTorch's\n"
        "default settings: the plain loop, its compiled blocks, and one row of the kernels.\n"
    )
    page.add(machine() + "\n\n## CPU\n")
    if arguments.only in (None, "neurons"):
        for shape, n_clusters in CPU_NEURONS:
            neuron_tables(page, shape, n_clusters, torch.float32, "cpu", arguments.seconds)
    if arguments.only in (None, "resonance"):
        resonance_tables(page, arguments.seconds)
    if arguments.only in (None, "stdp"):
        stdp_table(page, arguments.seconds)
    if arguments.only in (None, "language-model"):
        language_model_table(page, 3 * arguments.seconds)
    if arguments.only in (None, "monitor"):
        monitor_table(page, 3 * arguments.seconds)
    if arguments.only in (None, "decoding"):
        decoding_table(page)
    if arguments.only in (None, "gpu"):
        gpu_tables(page, arguments.seconds)
    if arguments.only is None:
        OUT.parent.mkdir(exist_ok=True)
        OUT.write_text(page.text, encoding="utf-8")
        print(f"\nwritten to {OUT}")


if __name__ == "__main__":
    main()
