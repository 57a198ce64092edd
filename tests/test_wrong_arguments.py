"""Every argument of every public function gets wrong types and values: it works, or one sentence names the argument."""

import re
import warnings
from collections.abc import Callable
from fractions import Fraction
from numbers import Integral
from typing import Any

import numpy as np
import pytest
import torch
from spikingjelly.activation_based.neuron import LIFNode
from torch import Tensor, nn

from nord_snn import layers, learning_rules, neurons, ops
from nord_snn.integrations import snntorch

ERRORS = (TypeError, ValueError, NotImplementedError)
Case = tuple[Callable[..., Any], dict[str, Any]]


def _spikes(*shape: int) -> Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(0)) < 0.5).float()


def _lif() -> dict[str, Any]:
    """Return arguments of the neurons with every part of the state."""
    state = ops.AssociativeLIFState(torch.zeros(3, 8), torch.zeros(3, 8), torch.zeros(3, 8, dtype=torch.int32))
    return {
        "x_seq": torch.randn(4, 3, 8), "state": state, "threshold": torch.full((8,), 0.25), "beta_mem": 0.9,
        "beta_syn": torch.tensor([0.5]), "cascade_weight": torch.rand(4, 4), "cascade_gain": torch.ones(4),
        "v_reset": -0.1, "refractory_steps": 2, "surrogate": "atan", "alpha": 4.0, "dynamics": ops.Dynamics(),
        "channels_first": False, "membrane_only": False, "return_v_seq": True, "backend": "auto",
    }  # fmt: skip


def _pairs() -> dict[str, Any]:
    return {
        "pre": _spikes(6, 2, 4), "post": _spikes(6, 2, 3), "tau_plus": 20.0, "tau_minus": 20.0,
        "weight": torch.rand(3, 4), "bounds": (-0.3, 1.0), "mu": 0.5, "geometry": None,
    }  # fmt: skip


def _traces() -> tuple[Tensor, Tensor]:
    return torch.zeros(2, 4), torch.zeros(2, 3)


def _ops() -> dict[str, Case]:
    q = _spikes(2, 1, 5, 8)
    keys, values = ops.pack_spikes(q, 2), torch.randn(1, 2, 5, 4)
    amplitudes = {"a_plus": 0.005, "a_minus": 0.005}
    triplets = {"tau_x": 101.0, "tau_y": 125.0, "a2_plus": 1e-3, "a2_minus": 7e-3, "a3_plus": 6e-3, "a3_minus": 2e-4}
    images = _pairs() | {
        "pre": _spikes(6, 2, 4, 5, 5), "post": _spikes(6, 2, 3, 3, 3), "weight": torch.rand(3, 4, 3, 3),
        "geometry": ops.ConvGeometry((3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1)),
    }  # fmt: skip
    return {
        "associative_lif": (ops.associative_lif, _lif()),
        "leaky_clamp": (
            ops.leaky_clamp,
            {"x": torch.randn(3, 8), "branch": torch.randn(3, 8), "gain": torch.ones(8), "leak": torch.full((8,), 0.1),
             "floor": torch.full((8,), -0.1), "backend": "auto"},
        ),
        "resonance": (
            ops.resonance,
            {"q": q, "k": q, "v": torch.randn(1, 5, 8), "n_heads": 2, "top_k": 3, "temperature": 0.5,
             "recency": torch.ones(2), "causal": True, "backend": "auto"},
        ),
        "resonance_cached": (
            ops.resonance_cached,
            {"q": q[:, :, 3:], "keys": keys, "values": values, "top_k": 3, "temperature": 0.5,
             "recency": torch.ones(2), "lengths": torch.tensor([4]), "window": 4, "backend": "auto", "trusted": False},
        ),
        "pack_spikes": (ops.pack_spikes, {"k": q, "n_heads": 2, "trusted": False}),
        "associative_cascade": (
            ops.associative_cascade,
            {"spikes": _spikes(3, 8), "weight": torch.rand(4, 4), "gain": torch.ones(4)},
        ),
        "spike": (ops.spike, {"x": torch.randn(3), "surrogate": "atan", "alpha": 4.0}),
        "reward_from_loss": (ops.reward_from_loss, {"loss": 3.0, "baseline": 4.0, "scale": 1.0}),
        "which_backend": (
            ops.which_backend,
            {"x": torch.zeros(2, 1, 8), "backend": "auto", "surrogate": "atan", "n_clusters": 4, "op": "associative_lif"},
        ),
        "stdp": (ops.stdp, _pairs() | amplitudes | {"state": ops.STDPState(*_traces())}),
        "stdp of images": (ops.stdp, images),
        "triplet_stdp": (ops.triplet_stdp, _pairs() | triplets | {"state": ops.TripletState(*_traces(), *_traces())}),
        "reward_modulated_stdp": (
            ops.reward_modulated_stdp,
            _pairs() | amplitudes
            | {"state": ops.RewardSTDPState(*_traces(), torch.zeros(3, 4)), "reward": 0.5, "tau_eligibility": 20.0},
        ),
    }  # fmt: skip


#: Values of another type, range, shape, dtype or device than an argument has.
def _hostile() -> dict[str, Any]:
    x = torch.randn(3, 8)
    quantised = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
    return {
        "None": None, "a list": [0.5, 0.5], "a tuple": (0.5, 0.5), "a list of tensors": [x, x], "a dict": {"v": x},
        "text": "nonsense", "bytes": b"0.5", "an array": np.ones(8, np.float32), "an object": object(), "a class": Tensor,
        "True": True, "nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "-1": -1, "0": 0, "2": 2,
        "-2.5": -2.5, "1.5": 1.5, "complex": 1j, "huge": 10**400, "2**70": 2**70, "a fraction": Fraction(1, 2),
        "float32": np.float32(0.5), "int64": np.int64(1), "a function": lambda *_: None, "a module": nn.Linear(2, 2),
        "no dimension": torch.tensor(0.5), "one element": torch.ones(1), "of nan": torch.full((1,), float("nan")),
        "[3, 8]": x, "[4, 3, 8]": torch.randn(4, 3, 8), "[8]": torch.ones(8), "[0]": torch.ones(0), "[0, 8]": torch.ones(0, 8),
        "[4, 0, 8]": torch.ones(4, 0, 8), "[0, 3, 8]": torch.ones(0, 3, 8), "[2, 1, 5, 8]": torch.ones(2, 1, 5, 8),
        "[3, 4, 0, 0]": torch.ones(3, 4, 0, 0), "sparse": x.to_sparse(), "sparse rows": x.relu().to_sparse_csr(),
        "quantised": quantised, "of nan and inf": torch.tensor([float("nan"), float("inf")]), "nested": _nested(),
        "a dense tensor as nested": _nested(torch.jagged), "as float8": torch.ones(8).to(torch.float8_e4m3fn),
        "a parameter": nn.Parameter(torch.ones(8)), "a lazy parameter": nn.UninitializedParameter(),
    }  # fmt: skip


def _nested(layout: Any = torch.strided) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(3, 8), torch.ones(2, 8)], layout=layout)


def _changed(x: Any) -> dict[str, Any]:
    """Return a valid tensor, and the tensors of a state, as another dtype, layout and device."""
    if isinstance(x, tuple) and any(isinstance(part, Tensor) for part in x):
        forms = {
            f"{place} {name}": (*x[:i], changed, *x[i + 1 :])
            for i, place in enumerate(("first", "second", "third", "fourth")[: len(x)])
            for name, changed in (_hostile() | _changed(x[i])).items()
        }
        of_kind = {name: type(x)(*values) for name, values in forms.items()}
        return of_kind | {"plain tuple": tuple(x), "list": list(x), "one less": tuple(x[:-1]), "one more": (*x, x[0])}
    if not isinstance(x, Tensor):
        return {}
    dtypes = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64)
    return {
        **{str(dtype): x.to(dtype) for dtype in dtypes},
        "on meta": x.to("meta"), "as sparse": x.to_sparse(), "as array": x.numpy(), "as list": x.tolist(),
        "with a dimension more": x[None], "with a dimension less": x.flatten()[0], "empty": x[:0],
        "with gradient": x.float().requires_grad_(), "expanded": x[:1].expand(x.shape) if x.ndim else x,
        "transposed": x.mT if x.ndim > 1 else x, "conjugated": x.to(torch.complex64).conj(),
        "negative": torch._neg_view(x) if x.is_floating_point() else x,
        "mkldnn": x.float().to_mkldnn(), "nan": torch.full_like(x, float("nan")) if x.is_floating_point() else x,
    }  # fmt: skip


def _complaint(call: str, function: Callable[..., Any], arguments: dict[str, Any], name: str, right: Any) -> str | None:
    """Return what is wrong with the answer to these arguments, None if it works or one sentence names the argument.

    A value of the right type may not fit the other arguments: the sentence then names one of them.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(**arguments)
    except ERRORS as error:
        message = str(error)
    except Exception as error:
        if "has no gradient" in str(error):
            return None
        return f"{type(error).__name__}: {error}"[:300]
    else:
        return None
    of_right_type = isinstance(arguments[name], (type(right), Tensor, Integral, type(None)))
    names = [name, *arguments] if of_right_type else [name]
    names += [_SAME[name]] if name in _SAME else []
    names += ["expects", call.split()[0]] if call.endswith(" call") else []
    named = any(re.search(rf"\b{re.escape(one)}\b", message) for one in names)
    if not named or "\n" in message or len(message) > 400:
        return f"does not name the argument in one sentence: {message}"[:300]
    return None


def _complaints(make: Callable[[], dict[str, Case]], case: str, name: str) -> list[str]:
    function, arguments = make()[case]
    right = arguments[name]
    values = _hostile() | _changed(right)
    if make is _calls:  # of other modules' own checks: linear maps and their dtype, tensors without data
        values = {what: value for what, value in values.items() if what not in _OF_TORCH}
    if name in ("surrogate", "surrogate_function", "spike_grad", "neuron", "update"):  # another callable's own errors
        values = {what: value for what, value in values.items() if not callable(value)}
    found = {what: _complaint(case, function, arguments | {name: value}, name, right) for what, value in values.items()}
    return [f"{case}({name}={what}): {complaint}" for what, complaint in found.items() if complaint]


#: Name of an argument in another library -> that of the same constant of ``AssociativeLIFNode``.
_SAME = {"v_threshold": "threshold", "alpha": "beta_syn", "beta": "beta_mem", "spike_grad": "surrogate"}
_OF_TORCH = {"on meta", "a lazy parameter", "torch.float16", "torch.bfloat16", "torch.float64"}


def _arguments(make: Callable[[], dict[str, Case]]) -> list[tuple[str, str]]:
    return [(case, name) for case, (_, arguments) in make().items() for name in arguments]


def _rule(kind: type, **more: Any) -> Case:
    return kind, {
        "step_mode": "m", "synapse": nn.Linear(4, 3, bias=False), "sn": neurons.AssociativeLIFNode(3, None, step_mode="m"),
        "tau_plus": 20.0, "tau_minus": 20.0, "reduction": "sum", "bounds": (-0.3, 1.0), "mu": 0.0, "max_norm": 1.0,
        "name": "fc", **more,
    }  # fmt: skip


def _step(kind: type, **arguments: Any) -> Case:
    """Return an update of a rule that has a recording."""
    function, of_rule = _rule(kind)

    def step(**arguments: Any) -> Any:
        rule = function(**of_rule)
        rule.sn(rule.synapse(_spikes(6, 2, 4)))
        rule.sn.reset()
        try:
            return rule.step(**arguments)
        finally:
            rule.close()

    return step, {"on_grad": False, "scale": 1.0, "positions": None, **arguments}


def _rules() -> dict[str, Case]:
    amplitudes = {"a_plus": 0.005, "a_minus": 0.005}
    triplets = {"tau_x": 101.0, "tau_y": 125.0, "a2_plus": 1e-3, "a2_minus": 7e-3, "a3_plus": 6e-3, "a3_minus": 2e-4}
    rewarded = {
        "reward_scale": 1.0,
        "baseline": 10.0,
        "baseline_decay": 0.9,
        "tau_eligibility": 20.0,
        "per_sample": False,
    }
    part = learning_rules.PlasticPart(nn.Linear(4, 3, bias=False))
    return {
        "STDP": _rule(learning_rules.STDP, **amplitudes),
        "TripletSTDP": _rule(learning_rules.TripletSTDP, **triplets),
        "RewardModulatedSTDP": _rule(learning_rules.RewardModulatedSTDP, **amplitudes, **rewarded),
        "source of RewardModulatedSTDP": _rule(learning_rules.RewardModulatedSTDP, source=learning_rules.GivenReward()),
        "STDP.step": _step(learning_rules.STDP),
        "TripletSTDP.step": _step(learning_rules.TripletSTDP),
        "RewardModulatedSTDP.step": _step(learning_rules.RewardModulatedSTDP, reward=1.0),
        "RewardModulatedSTDP.step of a loss": _step(learning_rules.RewardModulatedSTDP, loss=1.0),
        "PlasticPart": (learning_rules.PlasticPart, {"synapse": nn.Linear(4, 3), "bounds": (-0.3, 1.0)}),
        "PlasticPart.apply": (part.apply, {"delta": torch.zeros(2, 4), "rows": torch.tensor([0, 2])}),
        "PlasticPart.replace": (part.replace, {"delta": torch.zeros(3, 4)}),
        "LossBelowBaseline": (learning_rules.LossBelowBaseline, {"scale": 1.0, "baseline": 10.0, "decay": 0.9}),
        "LossBelowBaseline()": (learning_rules.LossBelowBaseline(), {"outcome": 1.0}),
        "GivenReward": (learning_rules.GivenReward, {"decay": 0.9}),
        "GivenReward()": (learning_rules.GivenReward(0.9), {"outcome": 1.0}),
    }


def _modules() -> dict[str, Case]:
    def node(n: int) -> nn.Module:
        return neurons.AssociativeLIFNode(n, None)

    sizes = {"n_features": 8, "n_heads": 2, "top_k": 3, "recency": True, "neuron": node}
    constants = {
        "n_features": 8, "n_clusters": 4, "preset": "nord", "channel_dim": -1, "cascade_radius": 1, "cascade_gain": 0.8,
        "threshold": 0.25, "beta_mem": 0.9, "beta_syn": 0.5, "own_decays": False, "learnable": ["threshold"],
        "v_reset": -0.1, "refractory_steps": 2, "surrogate": "atan", "alpha": 4.0, "hard_reset": False,
        "detach_reset": False, "dynamics": ops.Dynamics(), "step_mode": "m", "backend": "auto", "store_v_seq": False,
    }  # fmt: skip
    return {
        "AssociativeLIFNode": (neurons.AssociativeLIFNode, constants),
        "AssociativeLIFNode as SpikingJelly's": (
            neurons.AssociativeLIFNode,
            {"tau": 2.0, "v_threshold": 1.0, "surrogate_function": "atan", "decay_input": True},
        ),
        "AssociativeLIFNode.like": (
            neurons.AssociativeLIFNode.like,
            {"node": LIFNode(v_reset=None), "n_features": 8, "channel_dim": -1, "learnable": False, "backend": "auto"},
        ),
        "AssociativeCascade": (neurons.AssociativeCascade, {"n_features": 8, "n_clusters": 4, "radius": 1, "gain": 0.8}),
        "LeakyIntegrator": (
            neurons.LeakyIntegrator,
            {"shape": [2, 4], "beta_mem": 0.9, "gain": 0.5, "v_rest": 0.0, "beta_syn": 0.5, "step_mode": "m"},
        ),
        "DenseActivation": (neurons.DenseActivation, {"n_features": 8}),
        "make_neuron": (neurons.make_neuron, {"neuron": node, "n_features": 8, "store_v_seq": True}),
        "LeakyClamp": (layers.LeakyClamp, {"n_features": 8, "floor": -0.1, "leak": 0.1, "backend": "auto"}),
        "MultiScaleTemporalEncoder": (
            layers.MultiScaleTemporalEncoder,
            {"in_features": 8, "out_features": 4, "t_fast": 3, "t_slow": 1, "fast_scale": 15.0, "slow_scale": 5.0},
        ),
        "MembraneReadout": (layers.MembraneReadout, {"n_features": 8, "decay_logit": 1.4, "neuron": node}),
        "SpikingFeedForward": (layers.SpikingFeedForward, {"n_features": 8, "hidden_features": 16, "neuron": node}),
        "CoFiringResonance": (layers.CoFiringResonance, {**sizes, "causal": True, "backend": "auto"}),
        "SpikeFedResonance": (
            layers.SpikeFedResonance,
            {**sizes, "causal": True, "backend": "auto", "norm_eps": 1e-5, "spiking_values": True, "spikes_out": True,
             "norm": "batch", "channels_first": True},
        ),
        "NordBlock": (
            layers.NordBlock,
            {**sizes, "hidden_features": 16, "residual_scale": 0.1, "resonance": True, "clamp_floor": -0.1, "norm_eps": 1e-5},
        ),
        "SpikeFedBlock": (
            layers.SpikeFedBlock,
            {**sizes, "hidden_features": 16, "residual_scale": 0.1, "resonance": True, "norm_eps": 1e-5,
             "spiking_values": True},
        ),
        "SequenceCache": (
            layers.SequenceCache,
            {"lengths": torch.tensor([3]), "update": lambda keys, values: (keys, values), "window": 4},
        ),
        "AssociativeSynaptic": (
            snntorch.AssociativeSynaptic,
            {"n_features": 8, "n_clusters": 4, "alpha": 0.5, "beta": 0.9, "threshold": 0.25, "init_hidden": False,
             "output": False, "learn_alpha": True, "learn_beta": True, "learn_threshold": True, "spike_grad": "atan"},
        ),
        "AssociativeLeaky": (
            snntorch.AssociativeLeaky,
            {"beta": 0.9, "threshold": 1.0, "init_hidden": False, "output": False, "learn_beta": True,
             "learn_threshold": True, "spike_grad": "atan", "reset_mechanism": "subtract", "n_features": 8},
        ),
        "MultiStep": (snntorch.MultiStep, {"neuron": snntorch.AssociativeLeaky(beta=0.9, n_features=8)}),
    }  # fmt: skip


def _calls() -> dict[str, Case]:
    """Return calls of modules; their only input has no name in messages, where the module is named instead."""
    made = {
        "AssociativeLIFNode": (neurons.AssociativeLIFNode(8, 4, step_mode="m"), (4, 3, 8)),
        "AssociativeLIFNode of channels": (neurons.AssociativeLIFNode(8, 4, channel_dim=1), (3, 8, 2, 2)),
        "AssociativeLIFNode of a first input": (neurons.AssociativeLIFNode(step_mode="m"), (4, 3, 8)),
        "LeakyIntegrator": (neurons.LeakyIntegrator(8, step_mode="m"), (4, 3, 8)),
        "AssociativeCascade": (neurons.AssociativeCascade(8, 4), (3, 8)),
        "LeakyClamp": (layers.LeakyClamp(8), (3, 8)),
        "MultiScaleTemporalEncoder": (layers.MultiScaleTemporalEncoder(8), (3, 8)),
        "SpikingFeedForward": (
            layers.SpikingFeedForward(8, 16, neuron=lambda n: neurons.AssociativeLIFNode(n, 4)),
            (4, 3, 8),
        ),
        "MembraneReadout": (layers.MembraneReadout(8, neuron=lambda n: neurons.AssociativeLIFNode(n, 4)), (4, 3, 8)),
        "CoFiringResonance": (
            layers.CoFiringResonance(8, 2, neuron=lambda n: neurons.AssociativeLIFNode(n, 4)),
            (4, 3, 5, 8),
        ),
        "AssociativeSynaptic": (snntorch.AssociativeSynaptic(8, 4), (3, 8)),
        "AssociativeLeaky": (snntorch.AssociativeLeaky(beta=0.9, n_features=8), (3, 8)),
    }
    return {f"{name} call": (_resetting(module), {"x": torch.randn(shape)}) for name, (module, shape) in made.items()}


def _resetting(module: nn.Module) -> Callable[..., Any]:
    def call(x: Any) -> Any:
        for part in module.modules():
            for name in ("reset", "reset_mem"):
                getattr(part, name, lambda: None)()
        return module(x)

    return call


def _parameters() -> list[Any]:
    made = (_ops, _rules, _modules, _calls)
    return [pytest.param(make, case, id=f"{make.__name__[1:]}: {case}") for make in made for case in make()]


@pytest.mark.parametrize(("make", "case"), _parameters())
def test_wrong_types_and_values_work_or_are_named(make: Callable[[], dict[str, Case]], case: str) -> None:
    """Each argument in turn gets some sixty values of other types, shapes, dtypes, layouts and devices."""
    assert not [complaint for name in make()[case][1] for complaint in _complaints(make, case, name)]


def _numbers(make: Callable[[], dict[str, Case]]) -> list[Any]:
    return [
        pytest.param(make, case, name, id=f"{case}({name})")
        for case, (_, arguments) in make().items()
        for name, right in arguments.items()
        if isinstance(right, (int, float))
    ]


@pytest.mark.parametrize(("make", "case", "name"), [*_numbers(_ops), *_numbers(_rules), *_numbers(_modules)])
def test_what_is_no_number_is_not_taken_for_one(make: Callable[[], dict[str, Case]], case: str, name: str) -> None:
    """Constants are finite numbers and not True, counts are whole and at least 0, flags are True or False."""
    function, arguments = make()[case]
    right = arguments[name]
    values = [float("nan"), float("inf"), -float("inf"), "1", 1j, [1.0], b"1", Fraction(1, 2), np.ones(2)]
    if isinstance(right, bool):
        values += [1, 0.0, "yes", torch.tensor(True)]
    else:
        values += [True, False, np.bool_(True)]
        values += [1.5, -3, 2.0] if isinstance(right, int) and name != "channel_dim" else []
    taken = []
    for value in values:
        try:
            function(**arguments | {name: value})
        except (TypeError, ValueError):
            continue
        taken.append(value)
    assert not taken
