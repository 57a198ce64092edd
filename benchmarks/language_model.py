"""One training step of the language model: width 128, 4 blocks, 4 heads, FFN 256, vocabulary 2,048, batch 8 x 128."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from nordlm.training.runtime import keep_freed_memory
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor, nn

from nord_snn.models.nord import NordConfig, NordForCausalLM
from nord_snn.neurons import AssociativeLIFNode
from nord_snn.ops.topk_resonance.reference import reference

__all__ = ["BATCH", "LENGTH", "LOWER_BOUND", "check", "implementations", "keep_freed_memory"]

BATCH, LENGTH = 8, 128
LOWER_BOUND = "the matrix products alone"
NeuronFactory = Callable[[int], nn.Module]


def make_model() -> NordForCausalLM:
    """Return the model, with initial weights from a fixed seed."""
    torch.manual_seed(0)
    config = NordConfig(
        vocab_size=2048, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=LENGTH, n_clusters=16, recency=True,
    )  # fmt: skip
    return NordForCausalLM(config)


def with_torch_backends(net: NordForCausalLM) -> NordForCausalLM:
    """Set every backend of the model to plain PyTorch."""
    for module in net.modules():
        if hasattr(module, "backend"):
            module.backend = "torch"
    return net


def with_neurons(net: NordForCausalLM, factory: NeuronFactory) -> NordForCausalLM:
    """Replace the neurons of the model by ``factory(n_features)``."""
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, AssociativeLIFNode):
                neurons = factory(child.n_features)
                neurons.store_v_seq = child.store_v_seq
                setattr(parent, name, neurons)
    return net


class Synaptic(nn.Module):
    """snnTorch's neuron over a whole sequence, from rest."""

    def __init__(self) -> None:
        import snntorch

        super().__init__()
        self.neuron = snntorch.Synaptic(alpha=0.5, beta=0.9, spike_grad=snntorch.surrogate.atan())
        self.v_seq: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return spikes ``[T, *]``."""
        syn, mem = self.neuron.reset_mem()
        spikes, membranes = [], []
        for step in x.unbind(0):
            spike, syn, mem = self.neuron(step, syn, mem)
            spikes.append(spike)
            membranes.append(mem)
        if self.store_v_seq:
            self.v_seq = torch.stack(membranes)
        return torch.stack(spikes)


@contextmanager
def plain_resonance() -> Iterator[None]:
    """Replace the resonance op by its reference."""

    def plain(
        q: Tensor, k: Tensor, v: Tensor, *, n_heads: int, top_k: int, temperature: Any, recency: Any, causal: bool,
        backend: str,
    ) -> Tensor:  # fmt: skip
        return reference(q, k, v, n_heads, top_k, temperature, recency, causal)

    with mock.patch("nord_snn.layers.resonance.resonance", plain):
        yield


def training_step(net: NordForCausalLM, fused: bool = True, precision: str = "medium") -> Callable[[], object]:
    """Return a training step.

    Args:
        net: the model.
        fused: use the fused AdamW. Default: True, as ``examples/nord_lm/train.py``.
        precision: of float32 matrix products, for torch. Default: "medium", as ``examples/nord_lm/train.py``.
    """
    ids = torch.randint(0, 2048, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=fused)
    torch.set_float32_matmul_precision(precision)

    def step() -> None:
        net(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def with_plain_resonance(step: Callable[[], object]) -> Callable[[], object]:
    """Return the training step with the reference of the resonance op."""

    def run() -> None:
        with plain_resonance():
            step()

    return run


# Each of the following functions is called in a process of its own.


def plain_loop() -> Callable[[], object]:
    """Return a training step in plain PyTorch with PyTorch's default settings."""
    return with_plain_resonance(training_step(with_torch_backends(make_model()), fused=False, precision="highest"))


def compiled_loop() -> Callable[[], object]:
    """Return the training step of :func:`plain_loop` with every block compiled by torch.compile."""
    net = with_torch_backends(make_model())
    for block in net.blocks:
        block.compile()
    return with_plain_resonance(training_step(net, fused=False, precision="highest"))


def plain_loop_tuned() -> Callable[[], object]:
    """Return the training step of :func:`plain_loop` with all settings of ``train.py``, but without kernels."""
    keep_freed_memory()
    return with_plain_resonance(training_step(with_torch_backends(make_model())))


def kernels_alone() -> Callable[[], object]:
    """Return a training step with nord-snn's kernels and PyTorch's default settings."""
    return training_step(make_model(), fused=False, precision="highest")


def ours() -> Callable[[], object]:
    """Return the training step of ``train.py``."""
    keep_freed_memory()
    return training_step(make_model())


def with_lif_nodes() -> Callable[[], object]:
    """Return the training step of ``train.py`` with SpikingJelly's neurons."""
    keep_freed_memory()
    return training_step(
        with_neurons(make_model(), lambda n: neuron.LIFNode(surrogate_function=surrogate.ATan(), step_mode="m"))
    )


def with_synaptic() -> Callable[[], object]:
    """Return the training step of ``train.py`` with snnTorch's neurons."""
    keep_freed_memory()
    return training_step(with_neurons(make_model(), lambda n: Synaptic()))


def products_alone() -> Callable[[], object]:
    """Return the matrix products of one training step, forward and backward: a lower bound for every implementation."""
    keep_freed_memory()
    torch.set_float32_matmul_precision("medium")
    rows, width, hidden, vocabulary, time_steps = BATCH * LENGTH, 128, 256, 2048, 10
    shapes = [(rows * time_steps, width, width)] * 2  # queries, keys
    shapes += [(rows, width, width)] * 2  # values, output of the resonance
    shapes += [(rows * time_steps, width, hidden), (rows * time_steps, hidden, width)]  # feed-forward
    shapes = shapes * 4 + [(rows, width, width), (rows, width, vocabulary)]  # 4 blocks; encoder, head
    operands = [(torch.randn(n, i), torch.randn(o, i), torch.randn(n, o)) for n, i, o in shapes]

    def run() -> None:
        for x, weight, grad in operands:
            x @ weight.T
            grad @ weight
            grad.T @ x

    return run


def implementations() -> dict[str, Callable[[], Callable[[], object]]]:
    """Return a function for each name that builds a training step; the plain loop is first, the lower bound last."""
    builders = {
        "plain PyTorch loop": plain_loop,
        "torch.compile of the blocks of the plain loop": compiled_loop,
        "plain loop with the memory, matrix-product and optimizer settings of `train.py`": plain_loop_tuned,
        "nord-snn's kernels with PyTorch's default settings": kernels_alone,
        "**nord-snn**, as `train.py` runs it": ours,
        "`train.py` with SpikingJelly's `LIFNode`": with_lif_nodes,
    }
    if importlib.util.find_spec("snntorch"):
        builders["`train.py` with snnTorch's `Synaptic`"] = with_synaptic
    return builders | {LOWER_BOUND: products_alone}


def check() -> str:
    """Compare loss and gradients of kernels and plain loop; return the differences, or exit if they are too large."""
    ids = torch.randint(0, 2048, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    nets = with_torch_backends(make_model()), make_model()
    with plain_resonance():
        losses = [nets[0](input_ids=ids, labels=ids).loss]
    losses.append(nets[1](input_ids=ids, labels=ids).loss)
    for loss in losses:
        loss.backward()
    difference = float((losses[0] - losses[1]).detach().abs())
    worst = max(
        float((a.grad - b.grad).norm() / b.grad.norm().clamp(min=1e-12))
        for a, b in zip(nets[1].parameters(), nets[0].parameters(), strict=True)
        if a.grad is not None
    )
    if difference > 1e-4 or worst > 5e-4:
        raise SystemExit(f"kernels differ from the plain loop: loss by {difference:.1e}, gradients by {worst:.1e}")
    return f"loss within {difference:.1e} of the plain loop's, gradients within {worst:.1e}"
