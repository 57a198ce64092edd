"""Measure the kernels against their references, their peers and the floor: ``python benchmarks/run.py``.

A correctness gate runs before each table: figures of a kernel that computes something else are worth nothing. Tables are
printed and written to ``docs/benchmarks.md`` with machine and versions. With a CUDA GPU, its tables are added.
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
from timing import Row, copy_bandwidth, peak_bytes, race, race_apart

from nord_snn._compat.torch import allow_recompilations

OUT = Path(__file__).parents[1] / "docs" / "benchmarks.md"
CPU_NEURONS = (((10, 1024, 128), 16), ((10, 2048, 512), 64))
GPU_NEURONS = ((10, 65536, 512), 64)


class Page:
    """What is printed goes into the file too, once all of it is there."""

    def __init__(self) -> None:
        self.text = ""

    def say(self, text: str = "") -> None:
        """A line or a block."""
        print(text, flush=True)
        self.text += text + "\n"

    def table(self, rows: list[Row], baseline: str, floor_ms: float, floor: str) -> None:
        """Contestants, fastest last, and the floor."""
        self.say(f"| | ms | times as fast as the {baseline} |\n|---|---|---|")
        for row in sorted(rows, key=lambda row: -row.milliseconds):
            self.say(f"| {row.name} | {row.milliseconds:.2f} | {row.speedup:.1f} |")
        self.say(f"| lower bound: {floor} | {floor_ms:.2f} | {rows[0].milliseconds / floor_ms:.1f} |\n")


def machine() -> str:
    """Processor, threads, and the versions that matter."""
    names = ("torch", "numba", "triton", "cupy-cuda12x", "cupy-cuda13x", "spikingjelly", "snntorch", "numpy")
    versions = []
    for name in names:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
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
    """Forward, then forward and backward, of one shape."""
    inputs = neurons.case(shape, n_clusters, dtype, device)
    x = inputs["x"]
    page.say(f"### Neuron, x {list(shape)}, {n_clusters} clusters, {str(dtype).removeprefix('torch.')}, {device}\n")
    page.say(f"Correctness check: {neurons.gate(inputs)}.\n")
    for backward in (False, True):
        rows = race(neurons.contestants(inputs, backward), seconds)
        moved = neurons.floor(x, backward)
        floor_ms = 1e3 * moved / copy_bandwidth(device, x.numel() * x.element_size())
        page.say("Forward and backward:\n" if backward else "Forward without gradient:\n")
        page.table(rows, "plain loop", floor_ms, f"{moved / 1e6:.0f} MB at the copy bandwidth")
        torch.compiler.reset()
        gc.collect()


def resonance_tables(page: Page, seconds: float) -> None:
    """Time at the language model's shape and at a longer one, and how memory grows."""
    for T, B, S, D in ((10, 8, 128, 128), (10, 1, 1024, 128)):
        inputs = resonance.case(T, B, S, D)
        page.say(f"### Resonance, q and k [{T}, {B}, {S}, {D}], {resonance.HEADS} heads, top {resonance.TOP_K}\n")
        page.say(f"Correctness check: {resonance.gate(inputs)}.\n\nForward and backward:\n")
        moved = resonance.floor(inputs)
        floor_ms = 1e3 * moved / copy_bandwidth("cpu", inputs["q"].numel() * 4)
        page.table(
            race(resonance.contestants(inputs), seconds),
            "reference",
            floor_ms,
            f"{moved / 1e6:.0f} MB at the copy bandwidth",
        )
        torch.compiler.reset()
    page.say("Peak memory in forward and backward, MB, by context length S, q and k [4, 1, S, 64]:\n")
    lengths = (512, 1024, 2048, 4096)
    page.say("| S | " + " | ".join(map(str, lengths)) + " |\n|---|" + "---|" * len(lengths))
    for name in ("reference", "nord-snn, `torch`", "**nord-snn**"):
        peaks = [
            peak_bytes(resonance.contestants(resonance.case(4, 1, S, 64), compiled=False)[name]) / 1e6 for S in lengths
        ]
        page.say(f"| {name} | " + " | ".join(f"{peak:.0f}" for peak in peaks) + " |")
    page.say()


def language_model_table(page: Page, seconds: float) -> None:
    """One training step."""
    page.say("### Training step of the language model\n")
    page.say(f"{(language_model.__doc__ or '').strip()} Correctness check: {language_model.gate()}.\n")
    page.say("Each implementation runs in its own process; the processes take turns.\n")
    *rows, floor = race_apart(language_model.contestants(), seconds)
    page.table(rows, "plain loop", floor.milliseconds, language_model.FLOOR)
    tokens = language_model.BATCH * language_model.LENGTH
    ours = next(row for row in rows if row.name.startswith("**"))
    page.say(
        f"{tokens * 1e3 / rows[0].milliseconds:.0f} tokens/s with the plain loop, "
        f"{tokens * 1e3 / ours.milliseconds:.0f} with nord-snn.\n"
    )


def monitor_table(page: Page, seconds: float) -> None:
    """What counting spikes costs."""
    page.say("### Counting spikes\n")
    page.say(f"{(monitor.__doc__ or '').strip()} Correctness check: {monitor.gate()}.\n")
    page.say("| | ms | times as fast as without |\n|---|---|---|")
    for row in race_apart(monitor.contestants(), seconds):
        page.say(f"| {row.name} | {row.milliseconds:.2f} | {row.speedup:.3f} |")
    page.say()


def stdp_table(page: Page, seconds: float) -> None:
    """One step of each learning rule, and what it keeps in memory."""
    pre, post = stdp.case()
    page.say(f"### STDP, {list(stdp.SHAPE)} -> {stdp.N_OUT}\n")
    page.say(f"{(stdp.__doc__ or '').strip()} Correctness check: {stdp.gate(pre, post)}.\n")
    n_rows = stdp.SHAPE[1] * stdp.SHAPE[2]
    page.say(f"SpikingJelly's learner ran on {stdp.ROWS} of the {n_rows:,} rows; its times are scaled to all rows.\n")
    rows = race(stdp.contestants(pre, post), seconds)
    factor = n_rows / stdp.ROWS
    for row in rows:
        if row.name.startswith("SpikingJelly"):
            row.milliseconds *= factor
        else:
            row.speedup *= factor
    *rows, floor = rows
    page.table(rows, "first row", floor.milliseconds, stdp.FLOOR)
    page.say(
        "Peak memory, MB, by number of rows, [10, rows, 1, 512] -> 512 (one outer product per row would take 1 MB a row):\n"
    )
    counts = (64, 256, 1024, 4096)
    page.say("| rows | " + " | ".join(map(str, counts)) + " |\n|---|" + "---|" * len(counts))
    for kind in (stdp.STDP, stdp.TripletSTDP):
        flat = [x.flatten(1, 2)[:, :, None] for x in (pre, post)]
        peaks = [peak_bytes(stdp.ours(kind, flat[0][:, :n], flat[1][:, :n])) / 1e6 for n in counts]
        page.say(f"| `{kind.__name__}` | " + " | ".join(f"{peak:.0f}" for peak in peaks) + " |")
    page.say()


def decoding_table(page: Page) -> None:
    """Tokens a second at a short and at a long context, with the cache and without."""
    net = decoding.firing_model()
    page.say("### Decoding\n")
    page.say(
        f"{(decoding.__doc__ or '').strip()} The weights are initial weights; the embedding is scaled until 10 % of the "
        "input neurons fire."
    )
    page.say(f"Correctness check: {decoding.gate(net)}.\n")
    page.say("| prompt, tokens | cache | ms to the first token | ms a token | tokens/s |\n|---|---|---|---|---|")
    speeds = decoding.measure(net)
    for (length, use_cache), speed in speeds.items():
        name = "**yes**" if use_cache else "no"
        page.say(f"| {length} | {name} | {speed.first:.0f} | {speed.each:.1f} | {1e3 / speed.each:.2f} |")
    short, long = (speeds[context, True].each for context in decoding.CONTEXTS)
    config = net.config
    dense = config.num_hidden_layers * config.hidden_size * 4 * (config.t_fast + config.t_slow + 1)
    page.say(
        f"\nWith the cache a token takes {long / short:.2f} times as long after the longer prompt as after the shorter. "
        f"A position takes {decoding.cache_bytes(net):,} bytes of cache; with key spikes as floats it would take {dense:,}.\n"
    )


def gpu_tables(page: Page, seconds: float) -> None:
    """The neuron on a GPU, or that there is none."""
    page.say("## GPU\n")
    if not torch.cuda.is_available():
        page.say(
            "**Not measured.** No CUDA GPU was available when this page was written: the Triton and CuPy kernels are"
        )
        page.say(
            "tested for correctness (in Triton's interpreter; the CUDA source is compiled for the GPU and run on the CPU)"
        )
        page.say(
            'but not for speed. The section "Limits" of the README has measurements on one GPU at an earlier commit.'
        )
        page.say("On a machine with a GPU the same command adds the GPU tables here.")
        return
    for dtype in (torch.bfloat16, torch.float32):
        neuron_tables(page, *GPU_NEURONS, dtype, "cuda", seconds)


def main() -> None:
    """All tables, in one process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=15.0, help="how long the contestants of a table take turns")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--only",
        choices=("neurons", "resonance", "stdp", "language-model", "monitor", "decoding", "gpu"),
        help="one part; writes nothing",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    allow_recompilations(64)
    keep_freed_memory()  # else glibc's giving back and fetching of pages is what many of these times are made of
    page = Page()
    page.say("# Benchmarks\n")
    page.say(
        "Written by `python benchmarks/run.py`. The implementations take turns of a few calls in one process. Times and ratios"
    )
    page.say(
        "are medians over the turns. SpikingJelly's and snnTorch's neurons compute less: they have no cascade and no refractory"
    )
    page.say(
        "period, and `LIFNode` has no synaptic current. The allocator keeps freed memory for the next call (`keep_freed_memory`"
    )
    page.say(
        "of `nordlm`). In the table of the training step three rows use PyTorch's defaults instead: the plain loop, its compiled"
    )
    page.say("blocks, and the kernels alone.\n")
    page.say(machine() + "\n\n## CPU\n")
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
