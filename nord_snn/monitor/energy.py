"""Operations of a network, product by product, and their energy under published conventions."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from math import ceil, log2
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from nord_snn._compat.torch import TorchDispatchMode, operators_by_private_name, without_dispatch_modes
from nord_snn.neurons import AssociativeLIFNode
from nord_snn.neurons.detection import is_neuron
from nord_snn.ops.cached_resonance.packing import unpack_spikes
from nord_snn.ops.topk_resonance.reference import coincidences, keep_best, resonance_scores

__all__ = ["CONVENTIONS", "Convention", "EnergyProfile", "EnergyProfiler", "ProductCost", "profile_energy"]


@dataclass(frozen=True)
class Convention:
    """Energy of single operations, in joules.

    Attributes:
        mac: one multiply-accumulate.
        ac: one accumulate: the addition of a weight for an input spike.
        mul: one multiplication in a neuron's update.
        add: one addition or comparison in a neuron's update.
        byte: one byte read or written; 0 excludes memory.
        source: source of the figures.
    """

    mac: float
    ac: float
    mul: float
    add: float
    byte: float
    source: str


_HOROWITZ = "M. Horowitz, Computing's energy problem, ISSCC 2014: 45 nm, 0.9 V"

#: float32 arithmetic without memory; with all memory in a 32 KB SRAM (20 pJ for 8 bytes); with all memory in DRAM (1.3 nJ for 8
#: bytes, the lower end of the range); 8-bit integers accumulated in 32 bits, without memory.
CONVENTIONS: dict[str, Convention] = {
    "45nm-fp32": Convention(4.6e-12, 0.9e-12, 3.7e-12, 0.9e-12, 0.0, _HOROWITZ),
    "45nm-fp32-sram": Convention(4.6e-12, 0.9e-12, 3.7e-12, 0.9e-12, 2.5e-12, _HOROWITZ),
    "45nm-fp32-dram": Convention(4.6e-12, 0.9e-12, 3.7e-12, 0.9e-12, 162.5e-12, _HOROWITZ),
    "45nm-int8": Convention(0.3e-12, 0.1e-12, 0.2e-12, 0.1e-12, 0.0, _HOROWITZ),
}

#: Multiplications and additions of one neuron in one time step. Nord's: current (1, 1), membrane (2, 1), comparison (0, 1), reset
#: (0, 1), refractory counter (0, 1). All others count as a LIF neuron: membrane (2, 1), comparison (0, 1), reset (0, 1).
_UPDATE_NORD, _UPDATE_LIF = (3, 5), (2, 3)
#: Bytes of state of one neuron, read and written in each time step: v, i_syn and refractory counter; v.
_STATE_NORD, _STATE_LIF = 24, 8

_aten = torch.ops.aten


@dataclass
class ProductCost:
    """Counts of one product of a network, summed over all its calls.

    Attributes:
        name: the module that computes it.
        kind: ``"linear"``, ``"convolution"``, ``"activations"`` (product of two activations), ``"coincidences"`` or ``"values"``
            (resonance).
        dense: multiply-accumulates of the dense product, without skipping zeros.
        macs: multiply-accumulates of calls whose input was not exactly zeros and ones.
        acs: accumulates of calls whose input was exactly zeros and ones: active inputs times their fan-out.
        weight_bytes: weights with an active input, each read once per call.
        activation_bytes: inputs and outputs; spikes are one bit each.
        dense_weight_bytes: all weights, each read once per call; once for all calls if each call is one time step.
        dense_activation_bytes: inputs and outputs, all of them as numbers.
        calls: number of calls.
        steps: leading dimension of the module's input; it is time where it equals T of the network.
    """

    name: str
    kind: str
    dense: int = 0
    macs: int = 0
    acs: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0
    dense_weight_bytes: int = 0
    dense_activation_bytes: int = 0
    calls: int = 0
    steps: int = 1


#: All counts of a ProductCost at zero.
_ZERO_COUNTS: dict[str, Any] = {count.name: 0 for count in fields(ProductCost) if count.default == 0}


@dataclass
class EnergyProfile:
    """Operations of a network and their energy; ``str`` gives a Markdown table.

    The *dense twin* is the same network with an activation function in place of each layer of neurons, run for one time step.

    Attributes:
        products: every matrix product and convolution, by name and kind.
        multiplications: multiplications in neurons' updates, including those of the cascade.
        additions: additions in neurons' updates, including those of the cascade.
        state_bytes: state of neurons, read and written in each time step.
        elementwise: outputs of pointwise float operations, means, sums, softmax, pooling and normalisation; in a resonance, each
            scaled score, each score lowered by recency, and each weight of a selected key.
        twin_elementwise: elementwise outputs of the dense twin: operations repeated in each time step count once, and each
            neuron counts as one activation.
        time_steps: T of the network.
    """

    products: list[ProductCost] = field(default_factory=list)
    multiplications: int = 0
    additions: int = 0
    state_bytes: int = 0
    elementwise: int = 0
    twin_elementwise: int = 0
    time_steps: int = 1

    @property
    def macs(self) -> int:
        """Return the multiply-accumulates of all products."""
        return sum(product.macs for product in self.products)

    @property
    def acs(self) -> int:
        """Return the accumulates of all products."""
        return sum(product.acs for product in self.products)

    @property
    def dense(self) -> int:
        """Return the multiply-accumulates of all dense products, without skipping zeros."""
        return sum(product.dense for product in self.products)

    @property
    def neuron_ops(self) -> int:
        """Return the multiplications and additions of neurons and cascades."""
        return self.multiplications + self.additions

    @property
    def bytes(self) -> int:
        """Return the bytes of weights, activations and state, read and written."""
        moved = sum(product.weight_bytes + product.activation_bytes for product in self.products)
        return moved + self.state_bytes

    @property
    def joules(self) -> float:
        """Return the energy under the convention "45nm-fp32": 45 nm, float32, without memory."""
        return self.joules_under("45nm-fp32")

    @property
    def twin_joules(self) -> float:
        """Return the energy of the dense twin under the convention "45nm-fp32", see :meth:`twin_joules_under`."""
        return self.twin_joules_under("45nm-fp32")

    def joules_under(self, convention: str) -> float:
        """Return the energy under one of :data:`CONVENTIONS`. An elementwise output costs one multiply-accumulate."""
        price = _convention(convention)
        products = self.macs * price.mac + self.acs * price.ac
        neurons = self.multiplications * price.mul + self.additions * price.add
        return products + neurons + self.elementwise * price.mac + self.bytes * price.byte

    def twin_macs(self) -> int:
        """Return the multiply-accumulates of the dense twin: its products run once instead of in T time steps."""
        return sum(product.dense // self._time_repetitions(product) for product in self.products)

    def twin_joules_under(self, convention: str) -> float:
        """Return the energy of the dense twin under one of :data:`CONVENTIONS`.

        It counts each product once, all weights read once, activations as numbers, and elementwise operations: norms,
        softmax, and one activation function for each neuron.
        """
        price = _convention(convention)
        moved = sum(p.dense_weight_bytes + p.dense_activation_bytes // self._time_repetitions(p) for p in self.products)
        return (self.twin_macs() + self.twin_elementwise) * price.mac + moved * price.byte

    @property
    def quantised_twin_joules(self) -> float:
        """Return the energy of the twin with activations of ``ceil(log2(T + 1))`` bits and weights of 8 bits, without memory.

        Spike counts over T time steps range from 0 to T, so numbers of that many bits carry the same information (Yan, Bai
        and Wong 2024). A product of b and 8 bits costs ``b / 8`` of an 8-bit one (0.2 pJ), the 32-bit accumulation 0.1 pJ.
        """
        bits = ceil(log2(self.time_steps + 1))
        return self.twin_macs() * (0.2e-12 * bits / 8 + 0.1e-12)

    def grouped(self) -> "EnergyProfile":
        """Return a profile with one entry for all products whose names differ in numbers only: ``blocks.*.ffn.up``."""
        groups: dict[tuple[str, str, int], ProductCost] = {}
        for product in self.products:
            name = ".".join("*" if part.isdigit() else part for part in product.name.split("."))
            group = groups.setdefault((name, product.kind, product.steps), replace(product, name=name, **_ZERO_COUNTS))
            for count in _ZERO_COUNTS:
                setattr(group, count, getattr(group, count) + getattr(product, count))
        return replace(self, products=list(groups.values()))

    def __str__(self) -> str:
        """Return the Markdown table."""
        rows = ["| product | kind | dense MACs | MACs | ACs | bytes |", "|---|---|---|---|---|---|"]
        rows += [
            f"| {p.name or 'network'} | {p.kind} | {p.dense:,} | {p.macs:,} | {p.acs:,} | "
            f"{p.weight_bytes + p.activation_bytes:,} |"
            for p in self.products
        ]
        rows.append(f"| neurons and cascades | {self.neuron_ops:,} operations | | | | {self.state_bytes:,} |")
        rows.append(f"| elementwise | {self.elementwise:,} outputs | | | | |")
        rows.append(f"| **all** | | {self.dense:,} | {self.macs:,} | {self.acs:,} | {self.bytes:,} |")
        rows += ["", "| convention | this network, J | dense twin, J |", "|---|---|---|"]
        rows += [
            f"| {name} | {self.joules_under(name):.3g} | {self.twin_joules_under(name):.3g} |" for name in CONVENTIONS
        ]
        rows.append(f"| quantised twin, {ceil(log2(self.time_steps + 1))} bits | | {self.quantised_twin_joules:.3g} |")
        return "\n".join(rows)

    def _time_repetitions(self, product: ProductCost) -> int:
        """Return how many times fewer the dense twin computes this product (T or 1)."""
        return self.time_steps if product.steps == self.time_steps else 1


def _convention(convention: str) -> Convention:
    if convention not in CONVENTIONS:
        raise ValueError(f"unknown convention {convention!r}: expected one of {sorted(CONVENTIONS)}")
    return CONVENTIONS[convention]


def profile_energy(net: nn.Module, *inputs: Any, **more: Any) -> EnergyProfile:
    """Run ``net(*inputs, **more)`` once and count its operations.

    A product counts as accumulates only if its input is exactly zeros and ones: active inputs times their fan-out. All other
    products count as multiply-accumulates, including those with zeros. Resonance compares each spike of a query with every
    visible key, which are accumulates, and sums the weighted values of the selected keys, which are multiply-accumulates
    unless the values are spikes. Neurons continue from their stored state, as in any call.

    Args:
        net: any module.
        inputs: its positional arguments.
        more: its keyword arguments.

    Returns:
        The profile; ``print`` it for a table.

    Raises:
        ValueError: an unsupported operation contains products (fused attention), so that the figures would be too low; or the
            batch size equals the number of time steps, so that the two dimensions cannot be distinguished for the twin.

    Source: energies of single operations after Horowitz 2014; the quantised twin after Yan, Bai and Wong 2024,
    "Reconsidering the energy efficiency of spiking neural networks".

    Example:
        >>> net = nn.Sequential(AssociativeLIFNode(4, None, step_mode="m"), nn.Linear(4, 3, bias=False))
        >>> profile = profile_energy(net, torch.full((6, 2, 4), 9.0))  # fires in time steps 0 and 3
        >>> profile.macs, profile.acs, profile.dense
        (0, 48, 144)
        >>> f"{profile.joules / profile.twin_joules:.2f}"
        '5.38'
    """
    with torch.inference_mode(False), EnergyProfiler(net) as profiler, torch.no_grad():
        net(*inputs, **more)
    return profiler.profile


class EnergyProfiler(TorchDispatchMode):
    """Count all operations of ``net`` inside the ``with`` block: :func:`profile_energy` for any number of calls.

    Args:
        net: any module.

    Attributes:
        profile: the counts, complete at the end of the block.

    Raises:
        RuntimeError: it is already counting, or runs under ``torch.inference_mode()``, which hides products.
        ValueError: see :func:`profile_energy`; an ambiguous batch size raises at the end of the block.

    Example:
        >>> net = nn.Linear(4, 3)
        >>> with EnergyProfiler(net) as profiler:
        ...     for _ in range(2):
        ...         _ = net(torch.ones(5, 4))
        >>> profiler.profile.acs, profiler.profile.products[0].calls
        (120, 2)
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.profile = EnergyProfile()
        self._products: dict[tuple[str, str], ProductCost] = {}
        # Names of the running modules, innermost last, and the leading dimension of their input: negative if the input has
        # two dimensions, rows and features.
        self._names: list[tuple[str, int]] = []
        self._steps: dict[str, int] = {}
        self._single_step_calls: dict[str, int] = {}
        self._weights: set[int] = set()
        self._neurons_running = 0
        self._query_spikes: dict[str, Tensor] = {}
        self._elementwise: dict[int, int] = {}  # key: leading dimension of the module's input
        self._neuron_outputs = 0
        self._hooks: list[Any] = []
        self._cached_layers: set[str] = set()  # resonance layers that run with a cache now
        self._batches: set[int] = set()

    def __enter__(self) -> Self:
        """Start counting."""
        if self._hooks:
            raise RuntimeError("this EnergyProfiler is counting already: make another one")
        self._weights = {p.untyped_storage().data_ptr() for p in self.net.parameters()}
        for name, module in self.net.named_modules():
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
        self._query_spikes.clear()
        whole = max(self._steps.values(), default=1)
        if whole > 1 and whole in self._batches and error is None:
            raise ValueError(
                f"{whole} time steps and a batch of {whole} rows cannot be told apart, which the dense twin needs: profile a "
                "batch of another size"
            )
        self.profile.time_steps = max(whole, max(self._single_step_calls.values(), default=1))
        T = self.profile.time_steps
        for product in self._products.values():
            product.steps = self._count_steps(product.steps, whole)
            if whole == 1 and product.calls == T:
                product.steps = T  # a loop over single time steps: one call per step
                product.dense_weight_bytes //= T
        self.profile.products = list(self._products.values())
        self.profile.elementwise = sum(self._elementwise.values())
        if whole == 1:
            repeated = self.profile.elementwise if T > 1 else 0
        else:
            repeated = sum(n for lead, n in self._elementwise.items() if self._count_steps(lead, whole) == T)
        self.profile.twin_elementwise = self.profile.elementwise - repeated + repeated // T + self._neuron_outputs // T

    def _count_steps(self, lead: int, whole: int) -> int:
        """Guess the number of time steps in a module input from its leading dimension: T, T*N, or 1."""
        if whole > 1 and (lead == whole or abs(lead) in {whole * rows for rows in self._batches}):
            return whole
        return 1

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if torch.is_inference_mode_enabled():
            raise RuntimeError("products cannot be seen under torch.inference_mode(): use torch.no_grad()")
        out = func(*args, **(kwargs or {}))
        if self._neurons_running:  # counted by self.neurons
            return out
        packet = func.overloadpacket
        if packet in _HANDLERS:
            _HANDLERS[packet](self, args, out)
        elif _is_elementwise(func) and _returns_floats(out):
            if not self._in_cached_resonance():
                self.outputs(
                    (out[0] if isinstance(out, tuple) else out).numel(), self._names[-1][1] if self._names else 0
                )
        elif any(part in str(packet) for part in _UNSUPPORTED):
            raise ValueError(f"cannot count {packet}: what it costs is not known here")
        return out

    def _in_cached_resonance(self) -> bool:
        """Return whether a resonance with a cache runs: its parts, visible on the backend torch, must not count twice."""
        return bool(self._names) and self._names[-1][0] in self._cached_layers

    def outputs(self, number: int, lead: int) -> None:
        """Count elementwise outputs in a module whose input has this leading dimension."""
        self._elementwise[lead] = self._elementwise.get(lead, 0) + number

    def product(self, kind: str) -> ProductCost:
        """Return the entry of the innermost running module."""
        name, steps = self._names[-1] if self._names else ("", 0)
        entry = self._products.setdefault((name, kind), ProductCost(name, kind))
        entry.calls += 1
        entry.steps = steps
        return entry

    def matrix(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """Count ``a [*, M, K] @ b [*, K, N]``."""
        batch, (m, k, n) = out.numel() // max(out.shape[-1] * out.shape[-2], 1), (*a.shape[-2:], b.shape[-1])
        weight = b if self._is_weight(b) else a if self._is_weight(a) else None
        if weight is None and self._in_cached_resonance():
            return
        entry = self.product("activations" if weight is None else "linear")
        entry.dense += batch * m * k * n
        # Fan-out of an active element: n for a, m for b.
        choices = [(x, fan_out) for x, fan_out in ((a, n), (b, m)) if x is not weight and _binary(x)]
        if choices:
            entry.acs += min(int(x.count_nonzero()) * fan_out for x, fan_out in choices)
        else:
            entry.macs += batch * m * k * n
        if weight is not None:
            active = a if weight is b else b
            rows = active.reshape(-1, k) if weight is b else active.movedim(-2, -1).reshape(-1, k)
            entry.weight_bytes += int((rows != 0).any(0).sum()) * (weight.numel() // k) * weight.element_size()
            entry.dense_weight_bytes += weight.numel() * weight.element_size()
        entry.activation_bytes += sum(_activation_bytes(x) for x in (a, b, out) if x is not weight)
        entry.dense_activation_bytes += sum(x.numel() * x.element_size() for x in (a, b, out) if x is not weight)

    def convolution(self, x: Tensor, weight: Tensor, out: Tensor, args: tuple[Any, ...]) -> None:
        """Count a convolution: the fan-out of an input is the number of windows that contain it."""
        entry = self.product("convolution")
        transposed = args[3]
        dense = (x if transposed else out).numel() * weight[0].numel()
        entry.dense += dense
        if _binary(x):
            entry.acs += int(_aten.convolution(x.double(), torch.ones_like(weight).double(), None, *args).sum().round())
        else:
            entry.macs += dense
        entry.weight_bytes += weight.numel() * weight.element_size()
        entry.dense_weight_bytes += weight.numel() * weight.element_size()
        entry.activation_bytes += _activation_bytes(x) + _activation_bytes(out)
        entry.dense_activation_bytes += x.numel() * x.element_size() + out.numel() * out.element_size()

    def resonance(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        temperature: Tensor,
        recency: Tensor | None,
        n_heads: int,
        top_k: int,
        causal: bool,
    ) -> None:
        """Count the coincidences of each query with its visible keys, and the values of the selected keys."""
        scores = resonance_scores(coincidences(q, k, n_heads), temperature, recency, causal)
        values = v.unflatten(-1, (n_heads, -1)).transpose(1, 2)
        visible = scores > -torch.inf
        selected = keep_best(scores, top_k) & visible
        self.coincidences(q, _binary(k), k.shape[2], visible)
        self.weights(visible, selected, recency)
        self.values(selected, values, len(q) if v.shape[-1] > q.shape[-1] else 1)

    def cached_attention(self, name: str, module: Any, keys: Tensor, values: Tensor, window: int | None) -> None:
        """Count a resonance of new positions with cached ``keys [B, H, S_all, *]`` and ``values``, new positions included."""
        q = self._query_spikes[f"{name}.lif_q" if name else "lif_q"].float()
        steps, new, total = len(q), q.shape[2], keys.shape[2]
        if total == new:  # the cache was empty: self.resonance counts the op
            return
        self._cached_layers.add(name)
        width = module.n_features // module.n_heads
        if keys.dtype == torch.uint8:
            keys = unpack_spikes(keys, steps, width).float()
        if values.dtype == torch.uint8:
            values = unpack_spikes(values, steps, width).float()
        queries = q.unflatten(-1, (module.n_heads, -1)).permute(1, 3, 2, 0, 4).flatten(-2)
        scores = resonance_scores(queries @ keys.mT, module.temperature, module.recency, causal=True)
        position = torch.arange(total, device=q.device)
        visible = scores > -torch.inf
        if window is not None:
            visible = visible & (position[total - new :, None] - position < window)
        self.coincidences(q, _binary(keys), total, visible)
        selected = keep_best(scores.masked_fill(~visible, -torch.inf), module.top_k) & visible
        self.weights(visible, selected, module.recency)
        self.values(selected, values, steps if values.shape[-1] > width else 1)

    def coincidences(self, q: Tensor, binary_keys: bool, n_keys: int, visible: Tensor) -> None:
        """Count coincidences of queries ``q [T, B, S, D]`` with their visible keys, ``visible [B, H, S, n_keys]``."""
        steps, batch, _, width = q.shape
        n_heads = visible.shape[1]
        pairs = int(visible.sum())
        entry = self.product("coincidences")
        entry.dense += pairs * steps * width // n_heads
        entry.steps = steps
        if binary_keys and _binary(q):
            active = q.unflatten(-1, (n_heads, -1)).count_nonzero(dim=(0, 4)).transpose(1, 2)  # [B, H, S]
            entry.acs += int((active * visible.sum(-1)).sum())
        else:
            entry.macs += pairs * steps * width // n_heads
        keys = steps * batch * n_keys * width
        entry.activation_bytes += _activation_bytes(q) + (ceil(keys / 8) if binary_keys else keys * q.element_size())
        entry.dense_activation_bytes += (q.numel() + keys) * q.element_size()

    def weights(self, visible: Tensor, selected: Tensor, recency: Tensor | None) -> None:
        """Count the scaling of all scores and the softmax over selected keys, once for all time steps."""
        scored = int(visible.sum())
        self.outputs(scored + (0 if recency is None else scored) + int(selected.sum()), 0)

    def values(self, selected: Tensor, values: Tensor, steps: int) -> None:
        """Count the weighted sum of ``values [B, H, n_keys, V/H]`` over selected keys, ``selected [B, H, S, n_keys]``."""
        width, pairs = values.shape[-1], int(selected.sum())
        entry = self.product("values")
        entry.steps = steps
        entry.dense += pairs * width
        read = pairs * width * values.element_size()
        if _binary(values):
            entry.acs += int((selected.sum(2) * values.count_nonzero(-1)).sum())
            entry.activation_bytes += ceil(pairs * width / 8)
        else:
            entry.macs += pairs * width
            entry.activation_bytes += read
        written = selected[..., 0].numel() * width * values.element_size()
        entry.activation_bytes += written
        entry.dense_activation_bytes += read + written

    def neurons(self, name: str, module: nn.Module, spikes: Tensor) -> None:
        """Count the updates of a layer of neurons and its cascade."""
        self._neuron_outputs += spikes.numel()
        if getattr(module, "step_mode", "s") == "m":
            self._steps[name] = spikes.shape[0]
            self._batches.update(spikes.shape[1:2] if spikes.ndim > 2 else ())
        else:
            self._single_step_calls[name] = self._single_step_calls.get(name, 0) + 1
        is_nord = isinstance(module, AssociativeLIFNode)
        multiplications, additions = _UPDATE_NORD if is_nord else _UPDATE_LIF
        self.profile.multiplications += multiplications * spikes.numel()
        self.profile.additions += additions * spikes.numel()
        self.profile.state_bytes += (_STATE_NORD if is_nord else _STATE_LIF) * spikes.numel()
        cascade = module.cascade if isinstance(module, AssociativeLIFNode) else None
        if cascade is not None:
            rows = spikes.numel() // spikes.shape[-1]
            # Spike counts of clusters, their matrix product, and the current added to every neuron.
            self.profile.multiplications += rows * cascade.n_clusters * (cascade.n_clusters + 1)
            self.profile.additions += int(spikes.count_nonzero()) + rows * (cascade.n_clusters**2 + spikes.shape[-1])

    def _begin(self, name: str, hooked: nn.Module) -> Callable[..., Any]:
        def begin(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if module is not hooked:  # the hook was copied with the network
                return None
            self._neurons_running += is_neuron(module)
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            lead = (
                0 if not tensors or tensors[0].ndim < 2 else tensors[0].shape[0] * (-1 if tensors[0].ndim == 2 else 1)
            )
            self._names.append((name, lead))
            cache = kwargs.get("cache")
            if getattr(cache, "update", None) is None or not hasattr(module, "lif_q"):  # blocks pass it on
                return None
            observed = replace(cache, update=self._observe_update(name, module, cache.update, cache.window))
            return args, kwargs | {"cache": observed}

        return begin

    def _observe_update(self, name: str, module: Any, update: Any, window: int | None) -> Any:
        """Return an update of a cache that also counts the keys and values it returns."""

        def observed(keys: Tensor, values: Tensor) -> Any:
            stored = update(keys, values)
            with without_dispatch_modes():
                self.cached_attention(name, module, stored[0], stored[1], window)
            return stored

        return observed

    def _end(self, name: str, hooked: nn.Module) -> Callable[..., None]:
        def end(module: nn.Module, args: Any, output: Any) -> None:
            if module is not hooked:
                return
            self._neurons_running -= is_neuron(module)
            if name.rpartition(".")[2] == "lif_q" and output is not None:
                self._query_spikes[name] = output
            if is_neuron(module) and output is not None:
                with without_dispatch_modes():  # operations in here are not the network's
                    self.neurons(name, module, output[0] if isinstance(output, tuple) else output)
            self._cached_layers.discard(name)
            self._names.pop()

        return end

    def _is_weight(self, x: Tensor) -> bool:
        return x.untyped_storage().data_ptr() in self._weights


def _binary(x: Tensor) -> bool:
    return bool(((x == 0) | (x == 1)).all())


def _activation_bytes(x: Tensor) -> int:
    """Return the bytes of a tensor; spikes are one bit each."""
    return ceil(x.numel() / 8) if _binary(x) else x.numel() * x.element_size()


def _is_elementwise(func: Any) -> bool:
    """Return whether an operator is elementwise or a reduction."""
    if func.overloadpacket is _aten.clone:  # tagged pointwise by torch
        return False
    return torch.Tag.pointwise in func.tags or func.overloadpacket in _ELEMENTWISE


def _returns_floats(out: Any) -> bool:
    first = out[0] if isinstance(out, tuple) else out
    return isinstance(first, Tensor) and first.is_floating_point()


_nord = torch.ops.nord_snn

_HANDLERS: dict[Any, Callable[[EnergyProfiler, Any, Any], None]] = {
    _aten.mm: lambda mode, args, out: mode.matrix(args[0], args[1], out),
    _aten.bmm: lambda mode, args, out: mode.matrix(args[0], args[1], out),
    _aten.addmm: lambda mode, args, out: mode.matrix(args[1], args[2], out),
    _aten.baddbmm: lambda mode, args, out: mode.matrix(args[1], args[2], out),
    _aten.mv: lambda mode, args, out: mode.matrix(args[0], args[1][:, None], out[:, None]),
    _aten.addmv: lambda mode, args, out: mode.matrix(args[1], args[2][:, None], out[:, None]),
    _aten.dot: lambda mode, args, out: mode.matrix(args[0][None], args[1][:, None], out[None, None]),
    _aten.convolution: lambda mode, args, out: mode.convolution(args[0], args[1], out, args[3:]),
    _nord.resonance: lambda mode, args, out: mode.resonance(*args[:8]),
}

#: Operations that are neither products nor tagged pointwise by torch: each output counts.
_ELEMENTWISE = {
    *(_aten.mean, _aten.sum, _aten.avg_pool2d, _aten.max_pool2d_with_indices, _aten.native_layer_norm),
    *(_aten.native_batch_norm, _aten.native_group_norm, _aten.leaky_relu, _aten.hardswish, _aten.log_sigmoid_forward),
    *(_aten.glu, _nord.leaky_clamp, _aten.avg_pool3d, _aten.adaptive_max_pool2d),
    *(_aten.max_pool3d_with_indices, _aten.amax, _aten.amin, _aten.max, _aten.min, _aten.var, _aten.var_mean),
    *(_aten.std, _aten.prod, _aten.cumsum, _aten.linalg_vector_norm),
    *operators_by_private_name(
        "_softmax",
        "_log_softmax",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
        "_prelu_kernel",
        "_adaptive_avg_pool2d",
        "_adaptive_avg_pool3d",
    ),
}

#: Parts of names of operators that contain products and are not counted.
_UNSUPPORTED = (
    "scaled_dot_product",
    "multi_head_attention",
    "transformer_encoder_layer",
    "lstm",
    "gru",
    "rnn",
    "mkldnn",
    "cdist",
    "aten._int_mm",
    "scaled_mm",
    "aten._trilinear",
)
