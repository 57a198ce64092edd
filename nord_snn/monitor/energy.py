"""What a network computes, product by product, and what that would cost under published conventions."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from math import ceil, log2
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from nord_snn._compat.torch import TorchDispatchMode, operators_by_private_name, without_dispatch_modes
from nord_snn.neurons import AssociativeLIFNode
from nord_snn.neurons.foreign import is_neuron
from nord_snn.ops.cached_resonance.packing import unpack_spikes
from nord_snn.ops.topk_resonance.reference import coincidences, keep_best, resonance_scores

__all__ = ["CONVENTIONS", "Convention", "EnergyProfile", "EnergyProfiler", "ProductCost", "profile_energy"]


@dataclass(frozen=True)
class Convention:
    """Energy of single operations, in joules.

    Attributes:
        mac: a multiplication and an addition of two numbers.
        ac: an addition of a weight, where a spike arrives.
        mul: of one multiplication in a neuron's update.
        add: of one addition or comparison there.
        byte: of one byte that is read or written; 0 leaves memory out.
        source: where the figures are from.
    """

    mac: float
    ac: float
    mul: float
    add: float
    byte: float
    source: str


_HOROWITZ = "M. Horowitz, Computing's energy problem, ISSCC 2014: 45 nm, 0.9 V"

#: Float arithmetic without memory, with all memory in a 32 KB SRAM (20 pJ for 8 bytes), and with all of it in DRAM (1.3 nJ for 8
#: bytes, the lower end); and 8-bit integers summed in 32 bits without memory.
CONVENTIONS: dict[str, Convention] = {
    "45nm-fp32": Convention(4.6e-12, 0.9e-12, 3.7e-12, 0.9e-12, 0.0, _HOROWITZ),
    "45nm-fp32-sram": Convention(4.6e-12, 0.9e-12, 3.7e-12, 0.9e-12, 2.5e-12, _HOROWITZ),
    "45nm-fp32-dram": Convention(4.6e-12, 0.9e-12, 3.7e-12, 0.9e-12, 162.5e-12, _HOROWITZ),
    "45nm-int8": Convention(0.3e-12, 0.1e-12, 0.2e-12, 0.1e-12, 0.0, _HOROWITZ),
}

#: Multiplications and additions of one update of one neuron. Ours: current (1, 1), membrane (2, 1), comparison (0, 1), reset
#: (0, 1), rest (0, 1). Others are taken for a leaky integrator: membrane (2, 1), comparison (0, 1), reset (0, 1).
_UPDATE_OURS, _UPDATE_OTHERS = (3, 5), (2, 3)
#: Bytes of state of one neuron, read and written at each step: v, i and steps of rest; v.
_STATE_OURS, _STATE_OTHERS = 24, 8

_aten = torch.ops.aten


@dataclass
class ProductCost:
    """One product of a network, over all its calls.

    Attributes:
        name: the module that computes it.
        kind: ``"linear"``, ``"convolution"``, ``"activations"`` (of two of them), ``"coincidences"`` or ``"values"`` (resonance).
        dense: multiply-accumulates if none were left out.
        macs: those that were multiply-accumulates: the input was not exactly zeros and ones.
        acs: additions: active inputs times their fan-out, where it was.
        weight_bytes: of weights that met an active input, each read once a call.
        activation_bytes: inputs and outputs; spikes are one bit each.
        dense_weight_bytes: of all weights, each read once a call, and once where calls are steps.
        dense_activation_bytes: inputs and outputs, all of them as numbers.
        calls: how often it ran.
        steps: leading dimension of the module's input, which is time where it is that of the network.
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


#: A product that was not computed.
_NOTHING: dict[str, Any] = {count.name: 0 for count in fields(ProductCost) if count.default == 0}


@dataclass
class EnergyProfile:
    """What was computed, and what it would cost; printed, a table.

    Attributes:
        products: every matrix product and convolution, by name and kind.
        multiplications: in neurons' updates, the cascade's products included.
        additions: in neurons' updates, the cascade's additions included.
        state_bytes: state of neurons, read and written at each step.
        elementwise: outputs of pointwise float operations, means, sums, softmax, pooling and normalisation; in a resonance, each
            score that is scaled, each that recency lowers, and each weight of a key that is kept.
        twin_elementwise: the same of the dense twin: what runs at every step once, and one activation for each neuron.
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
        """Multiply-accumulates of all products."""
        return sum(product.macs for product in self.products)

    @property
    def acs(self) -> int:
        """Additions of all products."""
        return sum(product.acs for product in self.products)

    @property
    def dense(self) -> int:
        """Multiply-accumulates of all products if none were left out."""
        return sum(product.dense for product in self.products)

    @property
    def neuron_ops(self) -> int:
        """Multiplications and additions of neurons and cascades."""
        return self.multiplications + self.additions

    @property
    def bytes(self) -> int:
        """Weights, activations and state, read and written."""
        moved = sum(product.weight_bytes + product.activation_bytes for product in self.products)
        return moved + self.state_bytes

    @property
    def joules(self) -> float:
        """Energy of everything above under the convention "45nm-fp32": 45 nm, float32, without memory."""
        return self.joules_under("45nm-fp32")

    @property
    def twin_joules(self) -> float:
        """Energy of the dense twin under the same convention, see :meth:`twin_joules_under`."""
        return self.twin_joules_under("45nm-fp32")

    def joules_under(self, convention: str) -> float:
        """Energy under one of :data:`CONVENTIONS`. An elementwise output is priced as a multiply-accumulate."""
        price = _priced(convention)
        products = self.macs * price.mac + self.acs * price.ac
        neurons = self.multiplications * price.mul + self.additions * price.add
        return products + neurons + self.elementwise * price.mac + self.bytes * price.byte

    def twin_macs(self) -> int:
        """Multiply-accumulates of the dense twin: the same products once, not at each of T steps, by numbers and not spikes."""
        return sum(product.dense // self._times(product) for product in self.products)

    def twin_joules_under(self, convention: str) -> float:
        """Energy of the dense twin under one of :data:`CONVENTIONS`.

        Its products once, all weights read once, activations as numbers, and its elementwise work: norms, softmax, and an
        activation function in the place of each neuron.
        """
        price = _priced(convention)
        moved = sum(p.dense_weight_bytes + p.dense_activation_bytes // self._times(p) for p in self.products)
        return (self.twin_macs() + self.twin_elementwise) * price.mac + moved * price.byte

    @property
    def quantised_twin_joules(self) -> float:
        """Energy of the twin with activations of ``ceil(log2(T + 1))`` bits and weights of 8, without memory.

        T steps of zeros and ones count to T, so a network that sends such numbers once says as much (Yan, Bai and Wong
        2024). A product of b and 8 bits takes ``b / 8`` of an 8-bit one (0.2 pJ), its sum goes into 32 bits (0.1 pJ).
        """
        bits = ceil(log2(self.time_steps + 1))
        return self.twin_macs() * (0.2e-12 * bits / 8 + 0.1e-12)

    def grouped(self) -> "EnergyProfile":
        """The same with one entry for all products whose names differ in numbers only: ``blocks.*.ffn.up``."""
        groups: dict[tuple[str, str, int], ProductCost] = {}
        for product in self.products:
            name = ".".join("*" if part.isdigit() else part for part in product.name.split("."))
            group = groups.setdefault((name, product.kind, product.steps), replace(product, name=name, **_NOTHING))
            for count in _NOTHING:
                setattr(group, count, getattr(group, count) + getattr(product, count))
        return replace(self, products=list(groups.values()))

    def __str__(self) -> str:
        """The table, in Markdown."""
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

    def _times(self, product: ProductCost) -> int:
        """How often the twin computes it less often."""
        return self.time_steps if product.steps == self.time_steps else 1


def _priced(convention: str) -> Convention:
    if convention not in CONVENTIONS:
        raise ValueError(f"unknown convention {convention!r}: expected one of {sorted(CONVENTIONS)}")
    return CONVENTIONS[convention]


def profile_energy(net: nn.Module, *inputs: Any, **more: Any) -> EnergyProfile:
    """Run ``net(*inputs, **more)`` once and count what it computes.

    Additions are credited only where the input of a product is exactly zeros and ones: they are the active inputs times
    their fan-out. Anything else is a multiply-accumulate, zeros or not. Resonance compares each spike of a query with every
    key that it may bind to, which are additions, and weighs the values of the keys that it kept, which are
    multiply-accumulates unless the values are spikes. Neurons that hold state go on from it, as in any call.

    Args:
        net: any module.
        inputs: what it is called with.
        more: named arguments.

    Returns:
        The profile; ``print`` it for a table.

    Raises:
        ValueError: products are hidden in an operation that is not known here (fused attention), so that the figures would be
            too low; or the batch has as many rows as there are time steps, so that the twin's share cannot be told.

    Source: energies of single operations after Horowitz 2014; the quantised twin after Yan, Bai and Wong 2024,
    "Reconsidering the energy efficiency of spiking neural networks".

    Example:
        >>> net = nn.Sequential(AssociativeLIFNode(4, None, step_mode="m"), nn.Linear(4, 3, bias=False))
        >>> profile = profile_energy(net, torch.full((6, 2, 4), 9.0))  # fires at steps 0 and 3
        >>> profile.macs, profile.acs, profile.dense
        (0, 48, 144)
        >>> f"{profile.joules / profile.twin_joules:.2f}"
        '5.38'
    """
    with torch.inference_mode(False), EnergyProfiler(net) as profiler, torch.no_grad():
        net(*inputs, **more)
    return profiler.profile


class EnergyProfiler(TorchDispatchMode):
    """Count everything that ``net`` computes while the block runs: :func:`profile_energy` for any number of calls.

    Args:
        net: any module.

    Attributes:
        profile: what was counted, once the block has ended.

    Raises:
        RuntimeError: it is counting already, or runs under ``torch.inference_mode()``, which hides products.
        ValueError: see :func:`profile_energy`; what the batch makes ambiguous shows at the end of the block.

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
        # Of the modules that are running, innermost last, and the leading dimension of what they were given: below zero
        # where there are two dimensions, which are rows and features.
        self._names: list[tuple[str, int]] = []
        self._steps: dict[str, int] = {}
        self._single: dict[str, int] = {}
        self._weights: set[int] = set()
        self._neurons_running = 0
        self._fired: dict[str, Tensor] = {}
        self._elementwise: dict[int, int] = {}  # by the leading dimension of the module's input
        self._neuron_outputs = 0
        self._hooks: list[Any] = []
        self._grown: set[str] = set()  # resonances that look at a cache now
        self._batches: set[int] = set()

    def __enter__(self) -> Self:
        """Count until the block ends."""
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
        self._fired.clear()
        whole = max(self._steps.values(), default=1)
        if whole > 1 and whole in self._batches and error is None:
            raise ValueError(
                f"{whole} time steps and a batch of {whole} rows cannot be told apart, which the dense twin needs: profile a "
                "batch of another size"
            )
        self.profile.time_steps = max(whole, max(self._single.values(), default=1))
        T = self.profile.time_steps
        for product in self._products.values():
            product.steps = self._steps_in(product.steps, whole)
            if whole == 1 and product.calls == T:
                product.steps = T  # a loop over single steps calls it once in each
                product.dense_weight_bytes //= T
        self.profile.products = list(self._products.values())
        self.profile.elementwise = sum(self._elementwise.values())
        if whole == 1:
            repeated = self.profile.elementwise if T > 1 else 0
        else:
            repeated = sum(n for lead, n in self._elementwise.items() if self._steps_in(lead, whole) == T)
        self.profile.twin_elementwise = self.profile.elementwise - repeated + repeated // T + self._neuron_outputs // T

    def _steps_in(self, lead: int, whole: int) -> int:
        """Steps in the input of a module: its leading dimension is time, or time and batch flattened into one, or neither."""
        if whole > 1 and (lead == whole or abs(lead) in {whole * rows for rows in self._batches}):
            return whole
        return 1

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if torch.is_inference_mode_enabled():
            raise RuntimeError("products cannot be seen under torch.inference_mode(): use torch.no_grad()")
        out = func(*args, **(kwargs or {}))
        if self._neurons_running:  # counted as neurons, whatever they are made of
            return out
        packet = func.overloadpacket
        if packet in _HANDLERS:
            _HANDLERS[packet](self, args, out)
        elif _computes(func) and _floats(out):
            if not self._grows():
                self.outputs(
                    (out[0] if isinstance(out, tuple) else out).numel(), self._names[-1][1] if self._names else 0
                )
        elif any(part in str(packet) for part in _UNKNOWN):
            raise ValueError(f"cannot count {packet}: what it costs is not known here")
        return out

    def _grows(self) -> bool:
        """Whether a resonance with a cache runs, which is counted as such: on the backend torch its parts are seen as well."""
        return bool(self._names) and self._names[-1][0] in self._grown

    def outputs(self, number: int, lead: int) -> None:
        """Elementwise work in a module whose input has this leading dimension."""
        self._elementwise[lead] = self._elementwise.get(lead, 0) + number

    def product(self, kind: str) -> ProductCost:
        """The entry of the innermost module that runs."""
        name, steps = self._names[-1] if self._names else ("", 0)
        entry = self._products.setdefault((name, kind), ProductCost(name, kind))
        entry.calls += 1
        entry.steps = steps
        return entry

    def matrix(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """``a [*, M, K] @ b [*, K, N]``."""
        batch, (m, k, n) = out.numel() // max(out.shape[-1] * out.shape[-2], 1), (*a.shape[-2:], b.shape[-1])
        weight = b if self._is_weight(b) else a if self._is_weight(a) else None
        if weight is None and self._grows():
            return
        entry = self.product("activations" if weight is None else "linear")
        entry.dense += batch * m * k * n
        # An active element of a meets n outputs, one of b meets m.
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
        entry.activation_bytes += sum(_stored(x) for x in (a, b, out) if x is not weight)
        entry.dense_activation_bytes += sum(x.numel() * x.element_size() for x in (a, b, out) if x is not weight)

    def convolution(self, x: Tensor, weight: Tensor, out: Tensor, rest: tuple[Any, ...]) -> None:
        """An active input meets as many outputs as windows reach it."""
        entry = self.product("convolution")
        transposed = rest[3]
        dense = (x if transposed else out).numel() * weight[0].numel()
        entry.dense += dense
        if _binary(x):
            entry.acs += int(_aten.convolution(x.double(), torch.ones_like(weight).double(), None, *rest).sum().round())
        else:
            entry.macs += dense
        entry.weight_bytes += weight.numel() * weight.element_size()
        entry.dense_weight_bytes += weight.numel() * weight.element_size()
        entry.activation_bytes += _stored(x) + _stored(out)
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
        """Coincidences of each query with the keys it may bind to, and the values of those it keeps."""
        scores = resonance_scores(coincidences(q, k, n_heads), temperature, recency, causal)
        values = v.unflatten(-1, (n_heads, -1)).transpose(1, 2)
        seen = scores > -torch.inf
        kept = keep_best(scores, top_k) & seen
        self.coincidences(q, _binary(k), k.shape[2], seen)
        self.weights(seen, kept, recency)
        self.values(kept, values, len(q) if v.shape[-1] > q.shape[-1] else 1)

    def earlier(self, name: str, module: Any, keys: Tensor, values: Tensor, window: int | None) -> None:
        """The same of new positions with what a cache holds, ``keys [B, H, S_all, *]`` and ``values``, their own included."""
        q = self._fired[f"{name}.lif_q" if name else "lif_q"].float()
        steps, new, total = len(q), q.shape[2], keys.shape[2]
        if total == new:  # nothing was held, and the op is seen
            return
        self._grown.add(name)
        width = module.n_features // module.n_heads
        if keys.dtype == torch.uint8:
            keys = unpack_spikes(keys, steps, width).float()
        if values.dtype == torch.uint8:
            values = unpack_spikes(values, steps, width).float()
        queries = q.unflatten(-1, (module.n_heads, -1)).permute(1, 3, 2, 0, 4).flatten(-2)
        scores = resonance_scores(queries @ keys.mT, module.temperature, module.recency, causal=True)
        position = torch.arange(total, device=q.device)
        seen = scores > -torch.inf
        if window is not None:
            seen = seen & (position[total - new :, None] - position < window)
        self.coincidences(q, _binary(keys), total, seen)
        kept = keep_best(scores.masked_fill(~seen, -torch.inf), module.top_k) & seen
        self.weights(seen, kept, module.recency)
        self.values(kept, values, steps if values.shape[-1] > width else 1)

    def coincidences(self, q: Tensor, binary_keys: bool, n_keys: int, seen: Tensor) -> None:
        """Queries ``q [T, B, S, D]`` which see some of ``n_keys`` keys, ``seen [B, H, S, n_keys]``."""
        steps, batch, _, width = q.shape
        n_heads = seen.shape[1]
        pairs = int(seen.sum())
        entry = self.product("coincidences")
        entry.dense += pairs * steps * width // n_heads
        entry.steps = steps
        if binary_keys and _binary(q):
            active = q.unflatten(-1, (n_heads, -1)).count_nonzero(dim=(0, 4)).transpose(1, 2)  # [B, H, S]
            entry.acs += int((active * seen.sum(-1)).sum())
        else:
            entry.macs += pairs * steps * width // n_heads
        keys = steps * batch * n_keys * width
        entry.activation_bytes += _stored(q) + (ceil(keys / 8) if binary_keys else keys * q.element_size())
        entry.dense_activation_bytes += (q.numel() + keys) * q.element_size()

    def weights(self, seen: Tensor, kept: Tensor, recency: Tensor | None) -> None:
        """Coincidences become scores, and those of the keys that are kept a softmax, once for all steps."""
        scored = int(seen.sum())
        self.outputs(scored + (0 if recency is None else scored) + int(kept.sum()), 0)

    def values(self, kept: Tensor, values: Tensor, steps: int) -> None:
        """Mixing of ``values [B, H, n_keys, V/H]`` of those keys that are kept, ``[B, H, S, n_keys]``."""
        width, pairs = values.shape[-1], int(kept.sum())
        entry = self.product("values")
        entry.steps = steps
        entry.dense += pairs * width
        read = pairs * width * values.element_size()
        if _binary(values):
            entry.acs += int((kept.sum(2) * values.count_nonzero(-1)).sum())
            entry.activation_bytes += ceil(pairs * width / 8)
        else:
            entry.macs += pairs * width
            entry.activation_bytes += read
        written = kept[..., 0].numel() * width * values.element_size()
        entry.activation_bytes += written
        entry.dense_activation_bytes += read + written

    def neurons(self, name: str, module: nn.Module, spikes: Tensor) -> None:
        """Updates of a layer of neurons, and its cascade."""
        self._neuron_outputs += spikes.numel()
        if getattr(module, "step_mode", "s") == "m":
            self._steps[name] = spikes.shape[0]
            self._batches.update(spikes.shape[1:2] if spikes.ndim > 2 else ())
        else:
            self._single[name] = self._single.get(name, 0) + 1
        ours = isinstance(module, AssociativeLIFNode)
        multiplications, additions = _UPDATE_OURS if ours else _UPDATE_OTHERS
        self.profile.multiplications += multiplications * spikes.numel()
        self.profile.additions += additions * spikes.numel()
        self.profile.state_bytes += (_STATE_OURS if ours else _STATE_OTHERS) * spikes.numel()
        cascade = module.cascade if isinstance(module, AssociativeLIFNode) else None
        if cascade is not None:
            rows = spikes.numel() // spikes.shape[-1]
            # Spikes are counted into clusters, clusters meet each other, and every neuron gets its cluster's current.
            self.profile.multiplications += rows * cascade.n_clusters * (cascade.n_clusters + 1)
            self.profile.additions += int(spikes.count_nonzero()) + rows * (cascade.n_clusters**2 + spikes.shape[-1])

    def _begin(self, name: str, watched: nn.Module) -> Callable[..., Any]:
        def begin(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if module is not watched:  # a deep copy of the network took the hook along
                return None
            self._neurons_running += is_neuron(module)
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            lead = (
                0 if not tensors or tensors[0].ndim < 2 else tensors[0].shape[0] * (-1 if tensors[0].ndim == 2 else 1)
            )
            self._names.append((name, lead))
            remember = kwargs.get("remember")
            if remember is None or not hasattr(module, "lif_q"):  # blocks hand it on to their resonance
                return None
            return args, kwargs | {"remember": self._listen(name, module, remember, kwargs.get("window"))}

        return begin

    def _listen(self, name: str, module: Any, remember: Any, window: int | None) -> Any:
        """What a cache gives back says how many keys are looked at."""

        def listening(keys: Tensor, values: Tensor) -> Any:
            held = remember(keys, values)
            with without_dispatch_modes():
                self.earlier(name, module, held[0], held[1], window)
            return held

        return listening

    def _end(self, name: str, watched: nn.Module) -> Callable[..., None]:
        def end(module: nn.Module, args: Any, output: Any) -> None:
            if module is not watched:
                return
            self._neurons_running -= is_neuron(module)
            if name.rpartition(".")[2] == "lif_q" and output is not None:
                self._fired[name] = output
            if is_neuron(module) and output is not None:
                with without_dispatch_modes():  # what is computed here is not the network's
                    self.neurons(name, module, output[0] if isinstance(output, tuple) else output)
            self._grown.discard(name)
            self._names.pop()

        return end

    def _is_weight(self, x: Tensor) -> bool:
        return x.untyped_storage().data_ptr() in self._weights


def _binary(x: Tensor) -> bool:
    return bool(((x == 0) | (x == 1)).all())


def _stored(x: Tensor) -> int:
    """Bytes: spikes are bits."""
    return ceil(x.numel() / 8) if _binary(x) else x.numel() * x.element_size()


def _computes(func: Any) -> bool:
    """Whether it is work that is no product."""
    if func.overloadpacket is _aten.clone:  # torch calls it pointwise
        return False
    return torch.Tag.pointwise in func.tags or func.overloadpacket in _OTHER_WORK


def _floats(out: Any) -> bool:
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

#: Work that is no product and that torch does not call pointwise: an output each.
_OTHER_WORK = {
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

#: Products that are hidden in one call.
_UNKNOWN = (
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
