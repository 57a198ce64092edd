"""LeakyIntegrator: its equation in both step modes, its state, and bad input."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import functional

import nord_snn
from nord_snn.neurons import LeakyIntegrator


@pytest.mark.quick
@settings(max_examples=30, deadline=None)
@given(
    beta_mem=st.floats(0.01, 1.0), beta_syn=st.floats(0.0, 0.99), gain=st.none() | st.floats(-2, 2), v_rest=st.floats(-1, 1)
)  # fmt: skip
def test_the_integrator_equals_its_equation(
    beta_mem: float, beta_syn: float, gain: float | None, v_rest: float
) -> None:
    x_seq = torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {name: torch.tensor(value, dtype=torch.float64) for name, value in
               {"beta_mem": beta_mem, "beta_syn": beta_syn, "v_rest": v_rest}.items()}  # fmt: skip
    module = LeakyIntegrator(3, **options, gain=None if gain is None else torch.tensor(gain).double(), step_mode="m")
    v, i = torch.full((2, 3), v_rest, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    factor = 1 - beta_mem if gain is None else torch.tensor(gain).double()
    for x, output in zip(x_seq, module(x_seq), strict=True):
        i = beta_syn * i + x
        v = beta_mem * v + (1 - beta_mem) * v_rest + factor * i
        torch.testing.assert_close(output, v)


def test_single_time_steps_equal_the_sequence_which_continues_until_a_reset() -> None:
    x_seq = torch.randn(8, 2, 4, 5)
    whole = LeakyIntegrator((4, 5), beta_mem=torch.rand(4, 1) * 0.9 + 0.05, beta_syn=0.5, step_mode="m")
    single = copy.deepcopy(whole)
    functional.set_step_mode(single, "s")
    expected = whole(x_seq)
    assert torch.equal(torch.stack([single(x) for x in x_seq]), expected)
    nord_snn.reset(whole)
    assert torch.equal(torch.cat((whole(x_seq[:3]), whole(x_seq[3:]))), expected)
    functional.reset_net(whole)
    assert torch.equal(whole(x_seq), expected)


def test_state_keeps_its_precision_and_copies_are_detached() -> None:
    module = LeakyIntegrator(3, step_mode="m")
    x = torch.randn(2, 2, 3, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().min() > 0
    assert not copy.deepcopy(module).v.requires_grad
    module.half()
    assert module.v.dtype == torch.float32
    assert module(x.half()).dtype == torch.float16
    assert set(module.state_dict()) == {"beta_mem", "gain", "v_rest", "beta_syn"}


def test_bad_arguments_and_inputs_give_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"beta_mem must lie in \(0, 1\], got 1.5"):
        LeakyIntegrator(3, beta_mem=1.5)
    with pytest.raises(ValueError, match=r"beta_syn must lie in \[0, 1\), got 1"):
        LeakyIntegrator(3, beta_syn=1)
    with pytest.raises(ValueError, match=r"gain must be a number or broadcast to \[3\], got \[2\]"):
        LeakyIntegrator(3, gain=torch.ones(2))
    module = LeakyIntegrator(3)
    with pytest.raises(ValueError, match=r"expects shape \[\*, 3\], got \[2, 4\]"):
        module(torch.ones(2, 4))
    module(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"state of shape \[2, 3\], but got input of shape \[5, 3\].*call reset"):
        module(torch.ones(5, 3))
    with pytest.raises(TypeError, match=r"expects a floating-point tensor of shape \[\*, 3\], got dtype torch.int64"):
        module(torch.ones(2, 3, dtype=torch.long))


@pytest.mark.parametrize("functional_forward", [False, True])
def test_a_sequence_without_time_steps_gives_one_sentence(functional_forward: bool) -> None:
    module = LeakyIntegrator((3, 2), step_mode="m")
    empty = torch.ones(0, 4, 3, 2)
    with pytest.raises(ValueError, match=r"expects shape \[T, \*, 3, 2\] with at least one time step, got T = 0"):
        module.multi_step_functional_forward((empty,), (0.0, 0.0)) if functional_forward else module(empty)
    assert module(torch.ones(2, 0, 3, 2)).shape == (2, 0, 3, 2)


@pytest.mark.parametrize("v_rest", [0.0, 0.25, torch.tensor([0.25, 0.5, 1.0])])
def test_v_is_v_rest_at_rest_and_after_a_reset(v_rest: float | torch.Tensor) -> None:
    module = LeakyIntegrator(3, v_rest=v_rest, step_mode="m")
    for _ in range(2):
        torch.testing.assert_close(module.v, v_rest)
        module(torch.rand(2, 4, 3))
        assert module.v.shape == (4, 3)
        functional.reset_net(module)
    module.load_state_dict(LeakyIntegrator(3, v_rest=torch.as_tensor(v_rest) + 1).state_dict())
    torch.testing.assert_close(module.v, v_rest + 1)
    assert module.double()(torch.zeros(1, 1, 3).double()).flatten().tolist() == pytest.approx(
        torch.as_tensor(v_rest + 1).expand(3).tolist()
    )


@pytest.mark.parametrize("name", ["v", "i_syn"])
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_an_assigned_number_is_the_state_of_all_neurons(name: str, step_mode: str) -> None:
    x = torch.rand(2, 3) if step_mode == "s" else torch.rand(4, 2, 3)
    options = {"beta_mem": 0.5, "beta_syn": 0.5, "v_rest": 0.25, "step_mode": step_mode}
    number, tensor = LeakyIntegrator(3, **options), LeakyIntegrator(3, **options)
    for value in (2, 0.0):
        setattr(number, name, value)
        assert getattr(number, name) == value
        setattr(tensor, name, torch.full((2, 3), float(value)))
        expected = tensor(x)
        assert torch.equal(number(x), expected)
        assert not torch.equal(expected, LeakyIntegrator(3, **options)(x)) or (name, value) == ("i_syn", 0.0)
        nord_snn.reset(number)
        nord_snn.reset(tensor)


def test_a_reset_leaves_earlier_outputs_and_the_resting_potential_unchanged() -> None:
    module = LeakyIntegrator(3, v_rest=torch.tensor([0.25, 0.5, 1.0]))
    out = module(torch.ones(3))
    before = out.clone()
    functional.reset_net(module)
    assert torch.equal(out, before)
    module.v.zero_()
    assert module.v_rest.tolist() == [0.25, 0.5, 1.0]


def test_a_scalar_shape_integrates_a_batch_of_numbers():
    assert LeakyIntegrator((), beta_mem=0.5)(torch.ones(3)).tolist() == [0.5] * 3
