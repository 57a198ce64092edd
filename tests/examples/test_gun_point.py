"""Tests of examples/gun_point: its networks have the parts in their names, and they learn."""

import gun_point as script
import pytest
import snntorch
import torch
from torch import nn

from nord_snn.integrations.snntorch import AssociativeSynaptic
from nord_snn.layers import MembraneReadout, MultiScaleTemporalEncoder

PARTS = {"multi-scale encoder": MultiScaleTemporalEncoder, "membrane readout": MembraneReadout,
         "associative neurons": AssociativeSynaptic}  # fmt: skip


def has(name: str, kind: type[nn.Module]) -> bool:
    """Return whether the network of a name has a module of a class."""
    return any(isinstance(module, kind) for module in script.KINDS[name]().modules())


@pytest.mark.parametrize(("name", "parts"), [("snnTorch", set()), *((part, {part}) for part in PARTS),
                                             ("encoder and readout", {"multi-scale encoder", "membrane readout"}),
                                             ("all three", set(PARTS))])  # fmt: skip
def test_each_kind_has_the_parts_in_its_name(name, parts):
    assert {part for part, kind in PARTS.items() if has(name, kind)} == parts
    assert has(name, snntorch.Leaky) == ("associative neurons" not in parts)


def test_the_data_equal_those_of_the_ucr_archive():
    data = script.movements()
    assert data.train_x.shape == (50, 150)
    assert data.test_x.shape == (150, 150)
    assert data.test_y.bincount().tolist() == [76, 74]
    accuracy = script.without_spikes(data)["nearest neighbour"]
    assert accuracy == pytest.approx(1 - 0.0867, abs=1e-4)  # the error that the UCR archive states


@pytest.mark.parametrize("name", ["snnTorch", "all three"])
def test_training_learns_and_is_reproducible(name):
    data = script.movements()
    first, second = (script.train(script.KINDS[name], 0, 8, data) for _ in range(2))
    assert first == second
    assert first.accuracy > 0.65
    assert all(0 < rate < 1 for rate in first.rates)


def test_last_membrane_returns_the_last_membrane_potentials():
    neuron = script.leaky()
    last = script.LastMembrane(neuron)
    x_seq = torch.rand(3, 2, script.WIDTH)
    mem = torch.zeros(2, script.WIDTH)
    for x in x_seq:
        _, mem = neuron.neuron(x, mem)
    assert torch.equal(last(x_seq), mem)


def test_the_script_prints_a_table_and_draws_a_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "KINDS", {"snnTorch": script.KINDS["snnTorch"]})
    assert script.main(["--seeds", "2", "--epochs", "1", "--out", str(tmp_path)]) == 0
    assert "nearest neighbour" in capsys.readouterr().out
    assert (tmp_path / "gun_point.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        script.main(["--seeds", "0"])
