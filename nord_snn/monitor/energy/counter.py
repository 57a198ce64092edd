"""Count the operations of a running network, with a dispatch mode and with hooks that record which module runs."""

import threading
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nord_snn._compat.torch import TorchDispatchMode, without_dispatch_modes
from nord_snn.monitor.energy.network import CONNECTIONS, count_weights, footprint, notes_on, own_tensors
from nord_snn.monitor.energy.operators import PRODUCTS, is_elementwise, is_uncountable
from nord_snn.monitor.energy.report import EnergyProfile, ProductCost
from nord_snn.monitor.energy.time_steps import Shape, TimeSteps, check_time_steps
from nord_snn.monitor.layers import first_tensor
from nord_snn.neurons.detection import (
    cost_of_updates,
    is_neuron,
    runs_sequences,
    runs_snntorch,
    states_its_cost,
)
from nord_snn.ops.costs import COSTS, OpCost, ProductCount

__all__ = ["EnergyProfiler", "profile_energy"]

#: Fields that a call adds to the totals of its product.
_COUNTS = tuple(name for name in ProductCount._fields if name not in ("kind", "time_steps"))

#: Modules whose outputs NeuroBench counts besides those of neurons.
_ACTIVATIONS = (nn.ReLU, nn.Sigmoid)


class _Running(NamedTuple):
    """A running module.

    Attributes:
        name: its name in the network.
        shape: shape of its input.
        own_weights: addresses of weights that are plain attributes, if it is one of CONNECTIONS.
    """

    name: str
    shape: Shape
    own_weights: set[int]


def profile_energy(net: nn.Module, *inputs: Any, time_steps: int | None = None, **more: Any) -> EnergyProfile:
    """Run ``net(*inputs, **more)`` once and count its operations.

    A product counts as accumulates only if its input is exactly zeros and ones: active inputs times their fan-out. All other
    products count as multiply-accumulates, also where the input is 0. Resonance (attention whose scores count coincident spikes)
    has accumulates for each spike of a query and every key that the query can attend to, and multiply-accumulates for the
    weighted values of the selected keys, or accumulates if the values are spikes. Neurons continue from their stored state, as
    in any call.

    Args:
        net: any module.
        inputs: positional arguments of ``net``.
        time_steps: T. Default: None, inferred from the neurons' calls; the batch may have T rows. It is not passed to
            ``net``: if its forward has a keyword of this name, pass that positionally, or call ``net`` inside an
            :class:`EnergyProfiler`.
        more: keyword arguments of ``net``.

    Returns:
        The profile; ``print`` it for a table.

    Raises:
        ValueError: an operator contains products that cannot be counted (fused attention), so that the figures would be too
            low; ``time_steps`` is not a positive integer or contradicts the neurons' calls.

    Source: energies of single operations after Horowitz 2014; the quantised twin after Yan, Bai and Wong 2024,
    "Reconsidering the energy efficiency of spiking neural networks".

    Example:
        >>> from nord_snn.neurons import AssociativeLIFNode
        >>> net = nn.Sequential(AssociativeLIFNode(4, None, step_mode="m"), nn.Linear(4, 3, bias=False))
        >>> profile = profile_energy(net, torch.full((6, 2, 4), 9.0), time_steps=6)  # fires in time steps 0 and 3
        >>> profile.macs, profile.acs, profile.dense
        (0, 48, 144)
        >>> f"{profile.joules / profile.twin_joules:.2f}"
        '5.38'
    """
    with torch.inference_mode(False), EnergyProfiler(net, time_steps) as profiler, torch.no_grad():
        net(*inputs, **more)
    return profiler.profile


class EnergyProfiler(TorchDispatchMode):
    """Count all operations of ``net`` inside the ``with`` block: :func:`profile_energy` for any number of calls.

    Calls in other threads than that of the block do not count.

    Args:
        net: any module.
        time_steps: T. Default: None, inferred from the neurons' calls.

    Attributes:
        profile: the counts, complete at the end of the block.

    Raises:
        RuntimeError: the profiler is already counting, or runs under ``torch.inference_mode()``, which hides products.
        ValueError: see :func:`profile_energy`; ``time_steps`` is compared with the neurons' calls at the end of the block.

    Example:
        >>> net = nn.Linear(4, 3)
        >>> with EnergyProfiler(net) as profiler:
        ...     for _ in range(2):
        ...         _ = net(torch.ones(5, 4))
        >>> profiler.profile.acs, profiler.profile.products[0].calls
        (120, 2)
    """

    def __init__(self, net: nn.Module, time_steps: int | None = None) -> None:
        super().__init__()
        check_time_steps(time_steps)
        self.net = net
        self.profile = EnergyProfile()
        self._time = TimeSteps(time_steps)
        self._products: dict[tuple[str, str], ProductCost] = {}
        self._inputs: dict[tuple[str, str], tuple[Shape, int | None]] = {}  # of each product's last call
        self._elementwise: Counter[Shape] = Counter()  # input of the module -> elementwise outputs
        self._neuron_outputs = 0
        self._running: list[_Running] = []  # innermost last
        self._footprint: int | None = None
        self._padding = [0, 0]  # padded positions, all positions
        self._neurons: list[nn.Module] = []  # running layers of neurons, innermost last
        self._weights: set[int] = set()  # addresses of storages
        self._weights_are_known = True
        self._hooks: list[Any] = []
        self._thread = 0  # the thread that counts

    def __enter__(self) -> Self:
        """Start counting."""
        if self._hooks:
            raise RuntimeError("this EnergyProfiler is already counting: make another one")
        self._thread = threading.get_ident()
        self._find_weights()
        self._footprint = footprint(self.net)  # before neurons store their states in buffers
        for name, module in self.net.named_modules():
            if isinstance(module, torch.jit.RecursiveScriptModule):  # takes no hooks
                continue
            self._hooks.append(module.register_forward_pre_hook(self._begin(name, module), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._end(name, module), always_call=True))
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop counting."""
        super().__exit__(kind, error, trace)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if error is None:
            self._time.check()
        self._complete()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if torch.is_inference_mode_enabled():
            raise RuntimeError("products cannot be counted under torch.inference_mode(): use torch.no_grad()")
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if any(map(states_its_cost, self._neurons)):  # _add_neurons counts these neurons
            return out
        if func.name() in COSTS:
            self._add(COSTS[func.name()](*args, out=out, **kwargs))
        elif func.overloadpacket in PRODUCTS:
            self._add_product(PRODUCTS[func.overloadpacket](args, out, self._is_weight))
        elif is_elementwise(func, out):
            if self._neurons:  # _add_neurons counts the elementwise operations of neurons
                return out
            self._elementwise[self._input_shape()] += (out[0] if isinstance(out, tuple) else out).numel()
        elif is_uncountable(func):
            raise ValueError(
                f"cannot count {func.overloadpacket}, whose products run in one call: use an implementation of separate products"
            )
        return out

    def _add(self, cost: OpCost) -> None:
        for product in cost.products:
            self._add_product(product)
        self._elementwise[self._input_shape()] += cost.elementwise
        self._elementwise[()] += cost.elementwise_once
        self.profile.multiplications += cost.multiplications
        self.profile.additions += cost.additions
        self.profile.state_bytes += cost.state_bytes
        self._neuron_outputs += cost.neuron_outputs

    def _add_product(self, count: ProductCount) -> None:
        if count.sops is None:
            count = count._replace(sop_macs=count.macs, sops=count.acs)
        key = (self._running[-1].name if self._running else "", count.kind)
        entry = self._products.setdefault(key, ProductCost(*key))
        self._inputs[key] = (self._input_shape(), count.time_steps)
        entry.calls += 1
        for name in _COUNTS:
            setattr(entry, name, getattr(entry, name) + getattr(count, name))

    def _input_shape(self) -> Shape:
        """Return the shape of the input of the innermost running module."""
        return self._running[-1].shape if self._running else ()

    def _complete(self) -> None:
        """Set the fields of the profile that depend on T."""
        profile, time = self.profile, self._time
        T = profile.time_steps = time.number
        for key, product in self._products.items():
            product.steps = time.steps_of(product, *self._inputs[key])
            if time.runs_in_loop(product):  # the twin reads its weights once
                product.dense_weight_bytes //= T
        profile.footprint = (footprint(self.net) or 0) if self._footprint is None else self._footprint
        profile.weights, profile.zero_weights = count_weights(self.net)
        profile.notes = notes_on(self.net, *self._padding)
        profile.products = list(self._products.values())
        profile.elementwise = self._elementwise.total()
        repeated = sum(number for shape, number in self._elementwise.items() if time.repeats(shape))
        profile.twin_elementwise = profile.elementwise - repeated + repeated // T + self._neuron_outputs // T

    def _counts(self, module: nn.Module, hooked: nn.Module) -> bool:
        """Return whether a call counts: not that of a copy of the network, nor of another thread, whose operations do not."""
        return module is hooked and threading.get_ident() == self._thread

    def _begin(self, name: str, hooked: nn.Module) -> Callable[..., None]:
        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._counts(module, hooked):
                return
            if is_neuron(module):
                self._neurons.append(module)
            first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            shape = () if first is None or first.ndim < 2 else tuple(first.shape)
            own_weights = {_storage(x) for x in own_tensors(module)} if isinstance(module, CONNECTIONS) else set()
            self._running.append(_Running(name, shape, own_weights))
            if module is self.net:
                self._add_padding(kwargs.get("attention_mask"), shape)

        return begin

    def _end(self, name: str, hooked: nn.Module) -> Callable[..., None]:
        def end(module: nn.Module, args: Any, output: Any) -> None:
            if not self._counts(module, hooked):
                return
            if output is not None:  # None after an error
                self._add_neurons(name, module, output)
            if is_neuron(module):
                self._neurons.pop()
            self._running.pop()
            if output is not None and not self._neurons and (is_neuron(module) or isinstance(module, _ACTIVATIONS)):
                out = first_tensor(output)
                with without_dispatch_modes():
                    self.profile.outputs += out.numel()
                    self.profile.active_outputs += int(out.count_nonzero())

        return end

    def _add_neurons(self, name: str, module: nn.Module, output: Any) -> None:
        """Count the operations and time steps of a layer of neurons; do nothing for other modules."""
        in_loop = self._time.stated is not None and runs_snntorch(module)  # MultiStep runs a sequence step by step
        if not is_neuron(module) and not in_loop:
            return
        spikes = first_tensor(output)
        if in_loop or (is_neuron(module) and runs_sequences(module)):
            self._time.add_sequence(name, tuple(spikes.shape))
        else:
            self._time.add_single_step(name)
        if not in_loop:
            with without_dispatch_modes():  # operations of the cost function are not those of the network
                self._add(cost_of_updates(module, spikes))

    def _add_padding(self, mask: Any, shape: Shape) -> None:
        """Count the padded positions of a call; a mask also covers cached positions, which come first."""
        if isinstance(mask, Tensor) and mask.ndim == 2 and len(shape) > 1:
            with without_dispatch_modes():
                new = mask[:, -shape[1] :]
                self._padding[0] += int((new == 0).sum())
                self._padding[1] += new.numel()

    def _find_weights(self) -> None:
        parameters = list(self.net.parameters())
        self._weights = {_storage(p) for p in parameters if not is_lazy(p)}
        self._weights_are_known = not any(map(is_lazy, parameters))

    def _is_weight(self, x: Tensor) -> bool:
        if not self._weights_are_known:  # lazy modules set them in their first call
            self._find_weights()
        storage = _storage(x)
        return storage in self._weights or bool(self._running and storage in self._running[-1].own_weights)


def _storage(x: Tensor) -> int:
    """Return the address of the storage, the same for all views of a tensor."""
    return x.untyped_storage().data_ptr()
