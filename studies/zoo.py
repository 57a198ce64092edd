"""Compare the time of training steps of SpikingJelly's models with different neurons: ``python studies/zoo.py``.

Each model runs with SpikingJelly's ``LIFNode``, with ``AssociativeLIFNode`` constructed with the same arguments ("ours"), and
with ``AssociativeLIFNode.like`` of the ``LIFNode`` ("like"). First the outputs with ``LIFNode`` and with "like" are compared;
they must be equal up to rounding. Then the training steps of the three networks are interleaved. With ``--steps`` the networks
run one time step per call instead of a whole sequence.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from spikingjelly.activation_based.model import parametric_lif_net, sew_resnet, spiking_resnet, spiking_vgg
from torch import Tensor, nn

from nord_snn import AssociativeLIFNode, replace_neurons

try:  # not in SpikingJelly 0.0.0.0.14
    from spikingjelly.activation_based.model import ms_resnet, qkformer, spike_driven_transformer, spikformer
except ImportError:
    ms_resnet = qkformer = spike_driven_transformer = spikformer = None

__all__ = ["MODELS", "MeanOverTime", "difference", "networks", "training_step"]

#: Arguments of the neurons.
NODE = {"surrogate_function": surrogate.ATan(), "detach_reset": True}
#: Arguments of the transformers.
TRANSFORMER = {"in_channels": 3, "num_classes": 10, "num_heads": 4, "embed_dims": 64}

#: Name -> function that returns the model for a class of neurons, and the shape of the model's input: ``[T, N, C, H, W]``, or
#: ``[N, C, H, W]`` if the model itself repeats images over time steps.
MODELS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "sew_resnet18": (
        lambda kind: sew_resnet.sew_resnet18(num_classes=10, cnf="ADD", spiking_neuron=kind, **NODE),
        (4, 4, 3, 32, 32),
    ),
    "spiking_resnet18": (
        lambda kind: spiking_resnet.spiking_resnet18(num_classes=10, spiking_neuron=kind, **NODE),
        (4, 4, 3, 32, 32),
    ),
    "spiking_vgg11_bn": (
        lambda kind: spiking_vgg.spiking_vgg11_bn(num_classes=10, spiking_neuron=kind, **NODE),
        (4, 4, 3, 32, 32),
    ),
    "NMNISTNet": (
        lambda kind: parametric_lif_net.NMNISTNet(spiking_neuron=kind, **NODE),
        (4, 4, 2, 34, 34),
    ),
}
if spikformer is not None:
    MODELS |= {
        "ms_resnet18": (
            lambda kind: ms_resnet.ms_resnet18(num_classes=10, spiking_neuron=kind, **NODE),
            (4, 4, 3, 32, 32),
        ),
        "Spikformer": (
            lambda kind: spikformer.Spikformer(
                T=4, img_size_h=32, img_size_w=32, patch_size=4, depths=2, spiking_neuron=kind, **TRANSFORMER
            ),
            (4, 3, 32, 32),
        ),
        "QKFormer": (
            lambda kind: qkformer.QKFormer(
                T=4, depths=(1, 1, 1), spiking_neuron=kind, **TRANSFORMER | {"num_heads": (1, 2, 4)}
            ),
            (4, 3, 64, 64),
        ),
        "SpikeDrivenTransformer": (
            lambda kind: spike_driven_transformer.SpikeDrivenTransformer(
                T=4, depths=2, spiking_neuron=kind, **TRANSFORMER
            ),
            (4, 3, 64, 64),
        ),
    }


#: Models that can run single time steps; the others need whole sequences.
SINGLE_STEPS = ("sew_resnet18", "spiking_resnet18", "spiking_vgg11_bn", "NMNISTNet")


class MeanOverTime(nn.Module):
    """Return the mean output of a model over time: of one call with the sequence, or of a call for each time step."""

    def __init__(self, model: nn.Module, single_steps: bool = False) -> None:
        super().__init__()
        self.model = model
        self.single_steps = single_steps

    def forward(self, x: Tensor) -> Tensor:
        """Run all time steps."""
        logits = torch.stack([self.model(step) for step in x]) if self.single_steps else self.model(x)
        return logits.mean(0) if logits.ndim == 3 else logits


def training_step(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> float:
    """Run one training step and reset the neurons; return the loss."""
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(net(x), torch.arange(x.shape[-4]) % 10)
    loss.backward()
    optimizer.step()
    functional.reset_net(net)
    return loss.item()


def networks(name: str, single_steps: bool = False) -> tuple[dict[str, nn.Module], Tensor]:
    """Return the model with each kind of neurons, with equal weights, and an input."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    original, ours = make(neuron.LIFNode), make(AssociativeLIFNode)
    x = torch.rand(shape)
    for module in original.modules():  # larger weights: with the initial ones deep layers are silent
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.constant_(module.weight, 2.0)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=4 / module.in_features**0.5)
    for model in (original, ours):
        functional.set_step_mode(model, "s" if single_steps else "m")
    example = x[0] if single_steps else x
    with torch.no_grad():
        ours.eval()(example)  # finds the widths
    functional.reset_net(ours)
    ours.train().load_state_dict(original.state_dict(), strict=False)
    like = copy.deepcopy(original)
    replace_neurons(like, example, like=True)
    nets = {"LIFNode": original, "ours": ours, "like": like}
    return {key: MeanOverTime(model, single_steps) for key, model in nets.items()}, x


@torch.no_grad()
def difference(nets: dict[str, nn.Module], x: Tensor) -> float:
    """Return the largest difference of outputs with ``LIFNode`` and with "like", relative to the largest output.

    The networks run in training mode, in which batch norms scale currents so that the neurons of an untrained network fire.
    """
    outputs = []
    for name in ("LIFNode", "like"):
        torch.manual_seed(0)  # for dropout
        outputs.append(nets[name](x))
        functional.reset_net(nets[name])
    return float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max())


def measure(name: str, single_steps: bool, rounds: int) -> str:
    """Return one row of the table, medians over ``rounds`` training steps."""
    nets, x = networks(name, single_steps)
    deviation = difference(nets, x)
    assert deviation < 1e-4, f"{name}: the outputs with neurons like LIFNode differ by {deviation:.1e} of the largest"
    optimizers = {key: torch.optim.SGD(net.parameters(), 1e-3) for key, net in nets.items()}
    for key, net in nets.items():
        training_step(net, optimizers[key], x)
    seconds: dict[str, list[float]] = {key: [] for key in nets}
    for _ in range(rounds):
        for key, net in nets.items():
            start = time.perf_counter()
            training_step(net, optimizers[key], x)
            seconds[key].append(time.perf_counter() - start)
    times = {key: statistics.median(values) for key, values in seconds.items()}
    ratios = [
        statistics.median(value / base for value, base in zip(seconds[key], seconds["LIFNode"], strict=True))
        for key in ("ours", "like")
    ]
    return (
        f"| {name} | {' | '.join(f'{1000 * times[key]:.0f}' for key in nets)} | {ratios[0]:.2f} | {ratios[1]:.2f} "
        f"| {deviation:.1e} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("models", nargs="*", default=list(MODELS), help="names of models (default: all)")
    parser.add_argument("--steps", action="store_true", help="run one time step per call instead of a whole sequence")
    parser.add_argument("--rounds", type=int, default=9, help="training steps of each network")
    arguments = parser.parse_args()
    print("| model | `LIFNode` ms | ours ms | like ms | ours / `LIFNode` | like / `LIFNode` | difference of outputs |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.models:
        if arguments.steps and name not in SINGLE_STEPS:
            continue
        print(measure(name, arguments.steps, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
