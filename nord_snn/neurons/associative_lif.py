"""The associative LIF neuron as a SpikingJelly node."""

import math
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter, is_lazy

from nord_snn._compat.spikingjelly import StatefulNode
from nord_snn._compat.torch import initialize_lazy_module
from nord_snn.neurons.activity import FirstBatches, warn_of_inactive_neurons
from nord_snn.neurons.cascade import AssociativeCascade, LazyAssociativeCascade, largest_clusters
from nord_snn.neurons.like import arguments_like
from nord_snn.neurons.presets import OF_PRESET, known_surrogate, resolve_constants
from nord_snn.neurons.state import state_tensor
from nord_snn.neurons.strict import firing_above
from nord_snn.ops import AssociativeLIFState, BackendChoice, Dynamics, OpCost
from nord_snn.ops.cascade import check_clusters
from nord_snn.ops.checks import (
    as_count,
    as_number,
    check_features,
    check_flags,
    check_numbers,
    check_tensor,
    compute_dtype,
    describe,
    is_dense,
)
from nord_snn.ops.dispatch import BACKENDS, check_backend
from nord_snn.ops.lif.checks import check_constants
from nord_snn.ops.lif.cost import associative_update_cost, lif_update_cost
from nord_snn.ops.lif.op import Options, associative_lif_backend, associative_lif_of_rank
from nord_snn.ops.lif.reference import PUBLISHED, map_state
from nord_snn.ops.surrogate import SurrogateLike, resolve_surrogate

__all__ = ["AssociativeLIFNode", "Membranes"]

_LARGEST = torch.finfo(torch.float32).max

#: Parameters that can be learnable; those of the cascade always are.
LEARNABLE = ("threshold", "beta_mem", "beta_syn")


class Membranes:
    """Receive the membrane potentials of one call in ``v_seq``, ``[T, N, *, D]``; the call does not change the module's."""

    __slots__ = ("v_seq",)

    def __init__(self) -> None:
        self.v_seq: Tensor | None = None


_States = tuple[object, ...]
_Tensors = tuple[Tensor, ...]


class AssociativeLIFNode(StatefulNode):
    """Current-based LIF neurons with learnable thresholds, a refractory period and an associative cascade.

    The equations are those of :func:`nord_snn.ops.associative_lif`. The threshold of every neuron, both decays (stored as
    logits, so that they stay in (0, 1)) and the cascade's weight and gain are learnable.

    It is a SpikingJelly node: ``step_mode``, ``functional.reset_net``, ``set_step_mode``, ``detach_net`` and monitors work on
    it; its state is ``v``, ``i_syn`` and ``refractory``. It fits networks that make their neurons as
    ``spiking_neuron(**kwargs)``: without a width it takes the width of its first input, as ``nn.LazyLinear`` does, and it
    accepts SpikingJelly's argument names. It differs from SpikingJelly's nodes in two ways. Without a hard reset the
    resting potential is 0; the membrane potential is ``v_reset`` only while a neuron is refractory. If the batch shape changes
    while state is stored, the node raises an error; SpikingJelly's nodes reset silently.

    The default of an argument without "Default" below depends on ``preset``; :data:`nord_snn.neurons.PRESETS` has the values.

    Args:
        n_features: D, the number of neurons. Default: None, the width of the first input.
        n_clusters: number of clusters C of the cascade, a divisor of D; "auto" for the largest divisor up to 64. None switches
            the cascade off. With a cascade the default of ``beta_syn`` is 0.5 in every preset.
        preset: name of a preset, a set of default values. Default: None, "nord" (the neuron of the Nord language model) if
            ``n_features`` is passed and no argument under SpikingJelly's name, else "lif".
        channel_dim: dimension of the neurons in one time step: 1 for images ``[N, C, H, W]``. Default: None, the last
            one; without ``n_features``, 1 if a time step of the first input has four dimensions or more.
        cascade_radius: number of neighbouring clusters on each side with an initial cascade weight above 0.
        cascade_gain: initial gain of the cascade.
        threshold: initial threshold, a number or a tensor ``[D]``. Each neuron learns its own.
        beta_mem: initial membrane decay in (0, 1), a number, or a tensor ``[D]`` with one decay per neuron.
        beta_syn: initial synaptic decay in [0, 1), a number, or a tensor ``[D]`` with one decay per neuron. At 0 it is not
            learned, and input acts only in its own time step.
        own_decays: learn one decay per neuron. Default: False, one decay for all neurons unless a tensor is passed.
        learnable: which of "threshold", "beta_mem" and "beta_syn" are learned. Default: all.
        v_reset: membrane potential while refractory, and after a hard reset. It may be None if there is neither.
        refractory_steps: refractory period after a spike, in time steps.
        surrogate: a name from :data:`nord_snn.ops.SURROGATES` or a SpikingJelly surrogate module.
        alpha: sharpness of a named surrogate.
        hard_reset: set the membrane potential to ``v_reset`` after a spike instead of subtracting the threshold. Default: False.
        detach_reset: detach the spike in the reset, so that no gradient flows through the reset. Default: False.
        dynamics: equations of membrane potential and reset, see :class:`nord_snn.ops.Dynamics`, instead of ``hard_reset``,
            ``detach_reset`` and ``decay_input``. Default: None, the equations that these three arguments select.
        step_mode: ``"s"`` for one time step ``[N, *, D]`` per call, ``"m"`` for sequences ``[T, N, *, D]``. Default: ``"s"``.
        backend: see :func:`nord_snn.ops.associative_lif`. Default: ``"auto"``.
        store_v_seq: store membrane potentials in ``v_seq``, ``[T, N, *, D]``: of the last call in step mode ``"m"``; of all
            calls since the last reset in ``"s"``; of all calls since :meth:`start_sequence` if the caller passes states.
            Default: False.
        tau: SpikingJelly's membrane time constant, in time steps: ``beta_mem = 1 - 1 / tau``. Default: None.
        v_threshold: SpikingJelly's name of ``threshold``. Default: None.
        surrogate_function: SpikingJelly's name of ``surrogate``. Default: None.
        decay_input: as in SpikingJelly: False adds the whole current to the membrane potential, True ``(1 - beta_mem)`` of it.
            Default: None, as True.

    Attributes:
        strict: class attribute, whether neurons fire only above the threshold, and not at it: False, True in some subclasses.

    Raises:
        TypeError: ``v_reset`` is not a number where one is needed, ``n_clusters`` or ``learnable`` has another type, or an
            argument is given under two names.
        ValueError: D is not a multiple of C, a decay is not in its range, an input has the wrong rank or width, or its batch
            shape differs from that of the stored state.

    Source: the Nord spiking language model.

    Example:
        >>> node = AssociativeLIFNode(512, n_clusters=64, step_mode="m")
        >>> spikes = node(torch.rand(10, 4, 512))
        >>> spikes.shape, spikes.unique().tolist()
        (torch.Size([10, 4, 512]), [0.0, 1.0])

        In a network for images, after a convolution:

        >>> from spikingjelly.activation_based import surrogate
        >>> node = AssociativeLIFNode(tau=2.0, surrogate_function=surrogate.ATan(), detach_reset=True, step_mode="m")
        >>> node(torch.rand(4, 2, 16, 8, 8)).shape, node.n_features, node.channel_dim
        (torch.Size([4, 2, 16, 8, 8]), 16, 1)
    """

    strict = False

    def __new__(cls, n_features: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Make a lazy node if the width is not given."""
        lazy = n_features is None and cls is AssociativeLIFNode
        return super().__new__(LazyAssociativeLIFNode if lazy else cls)

    def __getnewargs__(self) -> tuple[int | None]:
        """Return the argument of ``__new__`` for copies and pickles."""
        return (self.n_features,)

    def __init__(
        self,
        n_features: int | None = None,
        n_clusters: int | str | None = OF_PRESET,
        *,
        preset: str | None = None,
        channel_dim: int | None = None,
        cascade_radius: int = OF_PRESET,
        cascade_gain: float = OF_PRESET,
        threshold: float | Tensor = OF_PRESET,
        beta_mem: float | Tensor = OF_PRESET,
        beta_syn: float | Tensor = OF_PRESET,
        own_decays: bool = False,
        learnable: Collection[str] = LEARNABLE,
        v_reset: float | None = OF_PRESET,
        refractory_steps: int = OF_PRESET,
        surrogate: SurrogateLike = OF_PRESET,
        alpha: float = OF_PRESET,
        hard_reset: bool = False,
        detach_reset: bool = False,
        dynamics: Dynamics | None = None,
        step_mode: str = "s",
        backend: str = "auto",
        store_v_seq: bool = False,
        tau: float | None = None,
        v_threshold: float | None = None,
        surrogate_function: SurrogateLike | None = None,
        decay_input: bool | None = None,
    ) -> None:
        check_flags(own_decays=own_decays, hard_reset=hard_reset, detach_reset=detach_reset, store_v_seq=store_v_seq)
        arguments = {
            "n_clusters": n_clusters, "cascade_radius": cascade_radius, "cascade_gain": cascade_gain,
            "threshold": threshold, "beta_mem": beta_mem, "beta_syn": beta_syn, "v_reset": v_reset,
            "refractory_steps": refractory_steps, "surrogate": surrogate, "alpha": alpha, "hard_reset": hard_reset,
        }  # fmt: skip
        spikingjelly_arguments = {
            "tau": tau, "v_threshold": v_threshold, "surrogate_function": surrogate_function, "decay_input": decay_input,
        }  # fmt: skip
        constants = resolve_constants(preset, n_features is not None, arguments, spikingjelly_arguments)
        constants["learnable"] = learnable
        if dynamics is None:
            charge = "sum" if decay_input is False else "average"
            dynamics = Dynamics(charge, hard_reset=hard_reset, detach_reset=detach_reset)
        self._build(
            n_features, constants, dynamics, channel_dim, own_decays,
            {"step_mode": step_mode, "store_v_seq": store_v_seq}, backend,
        )  # fmt: skip

    @classmethod
    def like(
        cls,
        node: nn.Module,
        n_features: int | None = None,
        *,
        channel_dim: int | None = None,
        learnable: bool = False,
        backend: str = "auto",
    ) -> "AssociativeLIFNode":
        """Return neurons that give the same spikes as ``node``.

        The arithmetic of SpikingJelly's ``IFNode`` and ``LIFNode`` with a soft reset is matched bit for bit. That of its
        ``ParametricLIFNode``, of nodes with a hard reset, and of snnTorch's ``Leaky`` and ``Synaptic`` is matched up to
        rounding, which can change a spike where the membrane potential is within rounding of the threshold.

        Args:
            node: a neuron of SpikingJelly or snnTorch, which is not changed; its state is not copied.
            n_features: D. Default: None, the width of the first input.
            channel_dim: dimension of the neurons, as in the class.
            learnable: learn thresholds, and decays where they are parameters. Default: False, only what ``node`` learns.
            backend: as in the class.

        Raises:
            TypeError: the class is unknown, an option or constant cannot be matched, or ``learnable`` is not a bool.

        Example:
            >>> from spikingjelly.activation_based.neuron import LIFNode
            >>> theirs = LIFNode(tau=2.0, v_reset=None, step_mode="m")
            >>> x = torch.rand(8, 2, 16) * 3
            >>> torch.equal(AssociativeLIFNode.like(theirs)(x), theirs(x))
            True
        """
        if not isinstance(learnable, bool):
            raise TypeError(f"learnable of like() must be True or False, got {describe(learnable)}")
        arguments = arguments_like(node)
        names = LEARNABLE if learnable else arguments.pop("learnable")
        neurons = cls(n_features, channel_dim=channel_dim, backend=backend, **arguments | {"learnable": names})
        if type(node).__name__ == "ParametricLIFNode":  # it learns 1 / tau = sigmoid(w)
            w: Any = node.w
            neurons._initial["beta_mem_logit"] = -w.detach().double()
            neurons.reset_parameters()
        return neurons

    def _build(
        self,
        n_features: int | None,
        constants: dict[str, Any],
        dynamics: Dynamics,
        channel_dim: int | None,
        own_decays: bool,
        node_options: dict[str, Any],
        backend: str,
    ) -> None:
        surrogate, alpha = constants["surrogate"], constants["alpha"]
        v_reset, refractory_steps, n_clusters = (
            constants["v_reset"], constants["refractory_steps"], constants["n_clusters"]
        )  # fmt: skip
        _check_sizes(n_features, channel_dim, constants, node_options["step_mode"])
        resolve_surrogate(surrogate, alpha)
        check_constants(Options(0.0, refractory_steps, surrogate, alpha, dynamics, False, False))
        if v_reset is None and (refractory_steps == 0 and not dynamics.hard_reset):
            pass
        elif not isinstance(v_reset, int | float) or isinstance(v_reset, bool) or not -_LARGEST <= v_reset <= _LARGEST:
            raise TypeError(
                "v_reset must be a number, the membrane potential while refractory or after a hard reset, got "
                f"{describe(v_reset)}: v_reset may be None only with refractory_steps=0 and without hard_reset"
            )
        if dynamics.hard_reset:
            dynamics = dynamics._replace(v_rest=float(v_reset))
        threshold = constants["threshold"]
        # BaseNode requires floats and uses v_reset as the resting potential, which is 0 without a hard reset.
        super().__init__(
            v_threshold=1.0 if isinstance(threshold, Tensor) else float(threshold),
            v_reset=dynamics.v_rest or None,
            surrogate_function=surrogate,
            detach_reset=dynamics.detach_reset,
            **node_options,
        )
        self.beta_mem_logit: Any  # None where the decay is a constant
        self.beta_syn_logit: Any
        self.v: float | Tensor
        self.i_syn: float | Tensor
        self.refractory: int | Tensor
        self.register_memory("i_syn", 0.0)
        self.register_memory("refractory", 0)
        self.n_features = cast(int, n_features)  # None in a lazy node until its first call
        self.alpha, self.backend, self.channel_dim = alpha, backend, channel_dim
        self.v_reset, self.refractory_steps, self.dynamics = v_reset, refractory_steps, dynamics
        self.first_batches = FirstBatches()
        if not hasattr(self, "v_seq"):  # SpikingJelly 0.0.0.0.14 registers it with store_v_seq only; reset() clears it
            self.register_memory("v_seq", None)
        own_decays = own_decays or any(isinstance(constants[name], Tensor) for name in ("beta_mem", "beta_syn"))
        self._initial = {
            "v_threshold": threshold,
            "beta_mem_logit": None if dynamics.tau else _logit(constants["beta_mem"], "beta_mem"),
            "beta_syn_logit": _synaptic_logit(constants["beta_syn"]),
        }
        _check_learnable(constants["learnable"])
        for name, value in self._initial.items():
            size = n_features if own_decays or name == "v_threshold" else 1
            learned = name.removeprefix("v_").removesuffix("_logit") in constants["learnable"]
            setattr(self, name, None if value is None else _parameter(size, learned))
        for name, value in self._initial.items():
            if isinstance(value, Tensor) and n_features is not None and value.shape not in ((n_features,), (1,)):
                raise ValueError(
                    f"{name.removeprefix('v_').removesuffix('_logit')} must be a number or a tensor [D] = [{n_features}], got "
                    f"{list(value.shape)}"
                )
        if n_clusters is not None and self._initial["beta_syn_logit"] is None:
            raise ValueError(
                "a cascade adds to the synaptic current, which beta_syn=0 discards: pass n_clusters=None, or beta_syn > 0"
            )
        self.cascade = _make_cascade(n_features, n_clusters, constants["cascade_radius"], constants["cascade_gain"])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set thresholds and decays to their initial values. The cascade has its own method; ``reset`` clears the state."""
        for name, value in self._initial.items():
            parameter = getattr(self, name)
            if parameter is not None and not is_lazy(parameter):
                with torch.no_grad():
                    parameter.copy_(torch.as_tensor(value, dtype=parameter.dtype).expand(parameter.shape))

    @property
    def beta_mem(self) -> Tensor:
        """Return the membrane decay, ``[1]`` or ``[D]``, in (0, 1)."""
        return (
            self.v_threshold.new_tensor([1 - 1 / self.dynamics.tau])
            if self.beta_mem_logit is None
            else self.beta_mem_logit.sigmoid()
        )

    @property
    def beta_syn(self) -> Tensor:
        """Return the synaptic decay, ``[1]`` or ``[D]``, in [0, 1)."""
        return self.v_threshold.new_zeros(1) if self.beta_syn_logit is None else self.beta_syn_logit.sigmoid()

    @property
    def is_membrane_only(self) -> bool:
        """Return whether the membrane potential is the whole state: no synaptic current, refractory period or cascade."""
        return self.beta_syn_logit is None and self.refractory_steps == 0 and self.cascade is None

    @property
    def emits_binary_spikes(self) -> bool:
        """Return whether all outputs are zeros and ones; False for a callable surrogate without ``spiking = True``."""
        return isinstance(self.surrogate_function, str) or getattr(self.surrogate_function, "spiking", False) is True

    @property
    def supported_backends(self) -> tuple[str, ...]:
        """Return every valid ``backend``; SpikingJelly 0.0.0.0.14 and its ``functional.set_backend`` read it."""
        return ("auto", *BACKENDS)

    @property
    def backend(self) -> str:
        """Return the requested backend. Assigning an unknown name raises; each call checks whether the backend can run."""
        return self._backend

    @backend.setter
    def backend(self, value: str) -> None:
        check_backend(value)
        self._backend = value

    def which_backend(self, x: Tensor) -> BackendChoice:
        """Return the backend that would run on input ``x``, and for each other backend the reason why it would not run."""
        clusters = None if self.cascade is None else self.cascade.n_clusters
        surrogate, _ = known_surrogate(self.surrogate_function, self.alpha)
        decays = [logit for logit in (self.beta_mem_logit, self.beta_syn_logit) if logit is not None]
        n_decays = max((len(logit) for logit in decays), default=1)
        x = x.movedim(self._dimension(self._step_ndim(x)), -1)
        return associative_lif_backend(x, self.backend, surrogate, clusters, self.dynamics, n_decays)

    def forward(
        self,
        x: Tensor,
        *,
        stateless: bool = False,
        state: AssociativeLIFState | None = None,
        new_states: list[AssociativeLIFState] | None = None,
        membranes: Membranes | None = None,
    ) -> Tensor:
        """Return the spikes for input current ``x``.

        Args:
            x: ``[N, *, D]`` in step mode ``"s"``, ``[T, N, *, D]`` in ``"m"``, with D at ``channel_dim``.
            stateless: start from rest and leave the stored state unchanged, as layers over whole sequences do. Default: False.
            state: with ``new_states``, the initial state. Default: None, rest. If the membrane potential is the whole state,
                ``i_syn`` and ``refractory`` may be None.
            new_states: a list to which the state after ``x`` is appended; the stored state is neither read nor changed. The
                caller marks the start of each sequence with :meth:`start_sequence`. Default: None, use the stored state.
            membranes: receives the membrane potentials of this call, in place of ``v_seq``. Default: None.

        Returns:
            Zeros and ones in the shape and dtype of ``x``.

        Raises:
            TypeError: ``state`` is passed without ``new_states``, or both ``stateless`` and ``new_states`` are passed.
        """
        if new_states is None and state is not None:
            raise TypeError("state needs new_states, a list to which the state after x is appended")
        if new_states is not None and stateless:
            raise TypeError("pass stateless or new_states, not both: without state, new_states starts from rest")
        multi, states_are_passed = self.step_mode == "m", new_states is not None
        self.check_input(x, self.step_mode)
        if not (stateless or states_are_passed) and not torch.compiler.is_compiling():
            self.check_not_recomputed()
        if states_are_passed:
            initial = None if state is None else self._state_tensors(x, state)
        else:
            initial = None if stateless else self._stored_state(x)
        no_currents = not states_are_passed if initial is None else initial.i_syn is None
        membrane_only = self.is_membrane_only and no_currents
        return_v_seq = self.store_v_seq or membranes is not None
        spikes, v_seq, final = self._run(x, initial, return_v_seq, membrane_only, single_step=not multi)
        if new_states is not None:
            new_states.append(final)
        elif not stateless:
            self.set_memories({"v": final.v} if membrane_only else final._asdict())
        if not torch.compiler.is_compiling() and self.first_batches.batches_left and self.training:
            self._count(spikes, is_whole_batch=stateless)
        if membranes is not None:
            membranes.v_seq = v_seq
        elif v_seq is not None:
            self._write_v_seq(
                v_seq if multi else v_seq.unsqueeze(0), append=states_are_passed or not (multi or stateless)
            )
        return spikes

    def _write_v_seq(self, v_seq: Tensor, append: bool) -> None:
        earlier = self.v_seq if append else None
        self.v_seq = v_seq if earlier is None else torch.cat((earlier, v_seq))

    def _count(self, spikes: Tensor, is_whole_batch: bool) -> None:
        """Count spikes in the first training batches, for :class:`NeuronActivityWarning`."""
        if torch.is_grad_enabled() and self.emits_binary_spikes:
            self.first_batches.add(spikes)
            if is_whole_batch:
                self._end_batch()

    def _end_batch(self) -> None:
        warn_of_inactive_neurons(self.first_batches.end_batch(), f"{type(self).__name__}({self.n_features})")

    def reset(self) -> None:
        """Set the state to rest."""
        super().reset()
        self._end_batch()

    def start_sequence(self) -> None:
        """Clear the stored membrane potentials and end a training batch: for callers that pass states."""
        self.v_seq = None
        if not torch.compiler.is_compiling():
            self._end_batch()

    def _stored_state(self, x: Tensor) -> AssociativeLIFState | None:
        """Return the stored state as tensors for this input; None at rest."""
        stored = v, i_syn, refractory = self.get_memories("v", "i_syn", "refractory")
        are_numbers = not (isinstance(i_syn, Tensor) or isinstance(refractory, Tensor))
        if are_numbers and not isinstance(v, Tensor) and stored == (self.dynamics.v_rest, 0.0, 0):
            return None
        return self._state_tensors(x, stored)

    def _state_tensors(self, x: Tensor, state: _States) -> AssociativeLIFState:
        """Return a state as tensors for this input; if the membrane potential is the whole state, the others are None."""
        v, i_syn, refractory = state
        if self.is_membrane_only and not (isinstance(i_syn, Tensor) or isinstance(refractory, Tensor)):
            step_shape = x.shape[1:] if self.step_mode == "m" else x.shape
            v = state_tensor(v, x, step_shape, compute_dtype(x), type(self).__name__)
            return AssociativeLIFState(v, cast(Tensor, None), cast(Tensor, None))
        if i_syn is None or refractory is None:
            raise ValueError(
                "state.i_syn and state.refractory must be tensors or numbers, because these neurons have a "
                "synaptic current, a refractory period or a cascade; got None"
            )
        return self.materialize_states((x,), state, self.step_mode)

    def _dimension(self, step_ndim: int) -> int:
        """Return the dimension of the neurons in a time step of ``step_ndim`` dimensions, as a negative number."""
        if self.channel_dim is None:
            return -1
        return self.channel_dim if self.channel_dim < 0 else self.channel_dim - step_ndim

    def _step_ndim(self, x: Tensor) -> int:
        """Return the number of dimensions of a time step of an input in the node's step mode."""
        return x.ndim - (self.step_mode == "m")

    def check_input(self, x: Tensor, step_mode: str) -> None:
        """Raise unless ``x`` is an input for this step mode: a floating tensor with D neurons at ``channel_dim``.

        Raises:
            TypeError: it is not a floating tensor.
            ValueError: its rank or width is wrong, or neurons are expected in its last dimension but seem to be in dimension 1.
        """
        multi = step_mode == "m"
        n_features = self.n_features
        layout = "[T, N, *, D]" if multi else "[N, *, D]"
        if not isinstance(x, Tensor) or x.is_nested or x.layout is not torch.strided:
            check_features(x, n_features, type(self).__name__, layout)
        dim = self._dimension(x.ndim - multi)
        if dim == -1:
            self._check_last(x, n_features, layout, multi)
            return
        batch = 1 if multi else 0
        if not batch - x.ndim < dim <= -1:
            raise ValueError(
                f"{type(self).__name__} expects {layout} with D at channel_dim={self.channel_dim} of a time step, got "
                f"{list(x.shape)}"
            )
        expected = f"{layout[:-3]}D at dimension {self.channel_dim} of a time step]"
        if x.shape[dim] != n_features:
            raise ValueError(f"{type(self).__name__} expects {expected} with D = {n_features}, got {list(x.shape)}")
        if not x.is_floating_point() or x.shape[0] == 0:
            check_features(x.movedim(dim, -1), n_features, type(self).__name__, layout)

    def _check_last(self, x: Tensor, n_features: int, layout: str, multi: bool) -> None:
        """Check an input with neurons in its last dimension; recommend ``channel_dim`` if they seem to be in dimension 1."""
        step_shape = tuple(x.shape[1:] if multi else x.shape) if isinstance(x, Tensor) else ()
        if self.channel_dim is None and len(step_shape) >= 4 and step_shape[1] == n_features:
            raise ValueError(
                f"{type(self).__name__}({n_features}) got a time step {list(step_shape)} whose dimension 1 has {n_features} "
                "channels: pass channel_dim=1 if these are its neurons, as after a convolution, or channel_dim=-1 for the last "
                "dimension"
            )
        if len(step_shape) >= 3 and step_shape[-1] != n_features and x.is_floating_point():
            raise ValueError(
                f"{type(self).__name__} expects shape {layout} with D = {n_features}, got {list(x.shape)}: neurons in dimension "
                "1 of a time step, such as the channels of a convolution, need channel_dim=1"
            )
        check_features(x, n_features, type(self).__name__, layout)

    def single_step_functional_forward(
        self, inputs: _Tensors, states: _States, **kwargs: object
    ) -> tuple[_Tensors, _States]:
        """Run one time step from explicit states ``(v, i_syn, refractory)``; the stored state is unchanged."""
        spikes, _, state = self._run(inputs[0], self.materialize_states(inputs, states, "s"), single_step=True)
        return (spikes,), tuple(state)

    def multi_step_functional_forward(
        self, inputs: _Tensors, states: _States, **kwargs: object
    ) -> tuple[_Tensors, _States]:
        """Run a sequence from explicit states ``(v, i_syn, refractory)``; the stored state is unchanged."""
        spikes, _, state = self._run(inputs[0], self.materialize_states(inputs, states, "m"))
        return (spikes,), tuple(state)

    def materialize_states(self, inputs: _Tensors, states: _States, step_mode: str) -> AssociativeLIFState:
        """Turn states at rest (numbers) into tensors for this input; raise if state tensors have another batch shape."""
        x = inputs[0]
        step_shape = x.shape[1:] if step_mode == "m" else x.shape
        dtypes = compute_dtype(x), compute_dtype(x), torch.int32
        return AssociativeLIFState(
            *(
                state_tensor(state, x, step_shape, dtype, type(self).__name__)
                for state, dtype in zip(states, dtypes, strict=True)
            )
        )

    def _run(
        self,
        x: Tensor,
        states: AssociativeLIFState | None,
        return_v_seq: bool = False,
        membrane_only: bool = False,
        *,
        single_step: bool = False,
    ) -> tuple[Tensor, Tensor | None, AssociativeLIFState]:
        """Run a sequence, or a single time step; membrane potentials have the shape of ``x``."""
        dim = self._dimension(x.ndim if single_step else x.ndim - 1)
        if dim != -1 and not x.is_contiguous() and x.movedim(dim, -1).is_contiguous():  # channels_last
            moved = None if states is None else map_state(lambda part: part.movedim(dim, -1), states)
            spikes, v_seq, state = self._run_op(x.movedim(dim, -1), moved, return_v_seq, membrane_only, -1, single_step)
            results = [None if part is None else part.movedim(-1, dim) for part in (spikes, v_seq, *state)]
            return cast(Tensor, results[0]), results[1], AssociativeLIFState(*cast(list[Tensor], results[2:]))
        return self._run_op(x, states, return_v_seq, membrane_only, dim, single_step)

    def _run_op(
        self,
        x: Tensor,
        states: AssociativeLIFState | None,
        return_v_seq: bool,
        membrane_only: bool,
        dim: int,
        single_step: bool,
    ) -> tuple[Tensor, Tensor | None, AssociativeLIFState]:
        surrogate, alpha = known_surrogate(self.surrogate_function, self.alpha)
        v_reset = 0.0 if self.v_reset is None else self.v_reset
        options = Options(v_reset, self.refractory_steps, surrogate, alpha, self.dynamics, membrane_only, return_v_seq)
        threshold = firing_above(self.v_threshold, compute_dtype(x)) if self.strict else self.v_threshold
        beta_syn, weight, gain = self.beta_syn_logit, None, None
        if self.cascade is not None:
            weight, gain = self.cascade(None, compute_dtype(x))
        return associative_lif_of_rank(
            self._input_current(x, dim), states, dim, single_step, options, self.backend, threshold, self.beta_mem_logit,
            0.0 if beta_syn is None else beta_syn, weight, gain, logits=True,
        )  # fmt: skip

    def _input_current(self, x: Tensor, dim: int) -> Tensor:
        """Return the input current, ``x``, which has the neurons in dimension ``dim``; a subclass may add to it."""
        return x

    def update_cost(self, spikes: Tensor) -> OpCost:
        """Return the cost of the updates that computed ``spikes``, cascade included."""
        if self.is_membrane_only:
            return lif_update_cost(spikes)
        spikes = spikes.movedim(self._dimension(self._step_ndim(spikes)), -1)
        return associative_update_cost(spikes, None if self.cascade is None else self.cascade.n_clusters)

    def extra_repr(self) -> str:
        """Return the width and the constants that are not learnable."""
        changed = [
            f"{name}={value!r}"
            for name, value, default in zip(Dynamics._fields, self.dynamics, PUBLISHED, strict=True)
            if value != default
        ]
        if self.channel_dim is not None:
            changed.append(f"channel_dim={self.channel_dim}")
        parts = [
            f"n_features={self.n_features}, v_reset={self.v_reset}, refractory_steps={self.refractory_steps}",
            f"surrogate={self.surrogate_function!r}, alpha={self.alpha}",
            *changed,
            f"step_mode={self.step_mode!r}, backend={self.backend!r}",
        ]
        return ", ".join(parts)


class LazyAssociativeLIFNode(LazyModuleMixin, AssociativeLIFNode):
    """A node that takes its width from the first input, and then becomes an :class:`AssociativeLIFNode`.

    As in ``nn.LazyLinear``, its parameters are ``UninitializedParameter`` until the first call. They can be passed to an
    optimizer, and the state dict can be saved and loaded, before and after that call.
    """

    cls_to_become = AssociativeLIFNode

    def initialize_parameters(self, x: Tensor, **_: Any) -> None:
        """Take the width, and ``channel_dim`` if that is None, from the first input."""
        if not isinstance(x, Tensor) or not is_dense(x) or not x.is_floating_point():
            raise TypeError(f"{type(self).__name__} expects a floating-point tensor, dense, got {describe(x)}")
        ndim = self._step_ndim(x)
        if ndim < 2:
            raise ValueError(
                f"{type(self).__name__} expects {'[T, N, *, D]' if self.step_mode == 'm' else '[N, *, D]'}, got {list(x.shape)}"
            )
        if self.channel_dim is None and ndim >= 4:
            self.channel_dim = 1
        width = x.shape[self._dimension(ndim)]
        loaded = not is_lazy(self.v_threshold)
        if loaded and len(self.v_threshold) != width:
            raise ValueError(
                f"the loaded parameters are those of {len(self.v_threshold)} neurons, the first input has {width}: "
                f"shape {list(x.shape)}, channel_dim={self.channel_dim}"
            )
        self.n_features = width
        for name, value in self._initial.items():
            parameter = getattr(self, name)
            if is_lazy(parameter):
                if isinstance(value, Tensor) and value.shape not in ((width,), (1,)):
                    raise ValueError(f"{name} has values for {len(value)} neurons, the first input has {width} neurons")
                parameter.materialize((width,), device=x.device)
        if not loaded:
            self.reset_parameters()
        if isinstance(self.cascade, LazyAssociativeCascade):
            initialize_lazy_module(self.cascade, width)
        elif self.cascade is not None:
            check_clusters(width, self.cascade.n_clusters)
            self.cascade.n_features = width


def _check_sizes(n_features: int | None, channel_dim: int | None, constants: dict[str, Any], step_mode: str) -> None:
    """Raise unless sizes and initial values of the parameters have the right type."""
    if n_features is not None:
        as_count(n_features, "n_features")
    if channel_dim is not None and (not isinstance(channel_dim, int) or isinstance(channel_dim, bool)):
        raise TypeError(f"channel_dim must be a whole number or None, got {describe(channel_dim)}")
    if not isinstance(step_mode, str):
        raise TypeError(f"step_mode must be 's' or 'm', got {describe(step_mode)}")
    as_count(constants["cascade_radius"], "cascade_radius", 0)
    check_numbers(cascade_gain=constants["cascade_gain"])
    for name in ("threshold", "beta_mem", "beta_syn"):
        if isinstance(constants[name], Tensor):
            check_tensor(constants[name], name, "of one element or [D]")
            if not constants[name].numel():
                raise ValueError(f"{name} must be a number or a tensor [D], got {list(constants[name].shape)}")
        else:
            as_number(constants[name], name)


def _check_learnable(learnable: Any) -> None:
    if isinstance(learnable, (str, Tensor)) or not isinstance(learnable, Collection):
        raise TypeError(f"learnable must be a collection of names, such as ['threshold'], got {describe(learnable)}")
    unknown = [name for name in learnable if not isinstance(name, str) or name not in LEARNABLE]
    if unknown:
        raise ValueError(f"learnable must be names of {list(LEARNABLE)}, got {', '.join(map(describe, unknown))}")


def _parameter(size: int | None, learned: bool) -> Any:
    return UninitializedParameter(requires_grad=learned) if size is None else nn.Parameter(torch.empty(size), learned)


def _make_cascade(
    n_features: int | None, n_clusters: int | str | None, radius: int, gain: float
) -> AssociativeCascade | None:
    if n_clusters is None:
        return None
    if isinstance(n_clusters, str) and n_clusters == "auto":
        if n_features is None:
            return LazyAssociativeCascade(radius, gain)
        n_clusters = largest_clusters(n_features)
    if not isinstance(n_clusters, int) or isinstance(n_clusters, bool):
        raise TypeError(f"n_clusters must be a number, 'auto' or None, got {describe(n_clusters)}")
    if n_clusters < 1:
        raise ValueError(f"n_clusters must be 1 or more, 'auto' or None, got {n_clusters}")
    return AssociativeCascade(n_clusters if n_features is None else n_features, n_clusters, radius=radius, gain=gain)


def _logit(beta: float | Tensor, name: str) -> float | Tensor:
    if isinstance(beta, Tensor):
        if not bool(((beta > 0) & (beta < 1)).all()):
            raise ValueError(f"{name} must lie in (0, 1), got values from {beta.min():.3g} to {beta.max():.3g}")
        return torch.logit(beta.double())
    if not 0 < beta < 1:
        raise ValueError(f"{name} must lie in (0, 1), got {beta}")
    return math.log(beta / (1 - beta))


def _synaptic_logit(beta: float | Tensor) -> float | Tensor | None:
    """Return the logit of the synaptic decay, or None if it is constantly 0."""
    if not isinstance(beta, Tensor) and beta == 0:
        return None
    return _logit(beta, "beta_syn")
