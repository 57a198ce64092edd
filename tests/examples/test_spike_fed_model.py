"""Tests of NordForCausalLM with ``block="spike_fed"`` and of the dense twin (GELU instead of neurons, one time step)."""

import pytest
import torch
from convert_original import to_original
from helpers import fire_easily, make_text, write_config
from nordlm.analysis.token_energy import profile_generated_token
from nordlm.inference.loading import load_model
from nordlm.training.model_card import parameter_counts
from nordlm.training.settings import SettingsError, parse_arguments, read_config, settings_from

from nord_snn.models.nord import NordConfig, NordForCausalLM
from nord_snn.monitor import SpikeMonitor, profile_energy

pytestmark = pytest.mark.quick

SMALL = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 12, "n_clusters": 4, "recency": True,
}  # fmt: skip
KINDS = {
    "currents": {"block": "spike_fed"},
    "spikes": {"block": "spike_fed", "spiking_values": True},
    "dense, values as well": {"block": "spike_fed", "spiking_values": True, "dense": True, "t_fast": 1, "t_slow": 0},
    "dense": {"block": "spike_fed", "dense": True, "t_fast": 1, "t_slow": 0},
    "dense published": {"dense": True, "t_fast": 1, "t_slow": 0},
}


@pytest.fixture(params=KINDS)
def model(request):
    torch.manual_seed(0)
    model = NordForCausalLM(NordConfig(**SMALL, **KINDS[request.param])).eval()
    fire_easily(model)
    return model


def test_the_model_learns_and_is_causal(model):
    ids = torch.randint(50, (3, 10))
    first = model.train()(input_ids=ids, labels=ids).loss
    first.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.05 * parameter.grad)
    assert model(input_ids=ids, labels=ids).loss < first
    model.eval()
    whole, part = model(input_ids=ids).logits, model(input_ids=ids[1:2, :6]).logits
    assert torch.allclose(whole[1:2, :6], part, atol=1e-5)


@pytest.mark.parametrize("length", [5, 12])
def test_generate_gives_the_same_tokens_with_and_without_a_cache(model, length):
    ids = torch.randint(50, (2, length))
    more = {
        "max_new_tokens": 13 - length,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
    }
    assert torch.equal(model.generate(ids, **more), model.generate(ids, use_cache=False, **more))


def test_save_and_load_are_exact(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, ids = load_model(tmp_path).eval(), torch.randint(50, (2, 9))
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_every_product_of_the_blocks_has_spikes_as_input():
    torch.manual_seed(0)
    model = NordForCausalLM(NordConfig(**SMALL, **KINDS["spikes"])).eval()
    fire_easily(model)
    ids = torch.randint(50, (3, 10))
    profile = profile_energy(model, input_ids=ids, use_cache=False)
    inside = [product for product in profile.products if product.name.startswith("blocks.")]
    assert len(inside) == 2 * (6 + 2)
    assert all(product.macs == 0 for product in inside)
    outside = {product.name for product in profile.products if product.macs}
    assert outside == {"encoder.projection", "readout", "lm_head"}
    token = profile_generated_token(model, ids[:1])
    assert {product.name for product in token.products if product.macs} == outside


@pytest.mark.parametrize("config", ["tiny", "small", "base"])
def test_every_layer_of_the_configs_fires_before_training(config):
    torch.manual_seed(0)
    fields = NordConfig(**read_config(config).model)
    model = NordForCausalLM(fields)
    with SpikeMonitor(model) as monitor, torch.no_grad():
        model(input_ids=torch.randint(fields.vocab_size, (2, 64)))
    assert min(monitor.rates().values()) > 0.005
    assert max(monitor.rates().values()) < 0.25


def test_the_twin_differs_only_in_the_neurons():
    spiking, dense = (NordForCausalLM(NordConfig(**SMALL, **KINDS[kind])) for kind in ("currents", "dense"))
    without_neurons = {name for name, _ in spiking.named_parameters() if "lif" not in name}
    assert without_neurons == {name for name, _ in dense.named_parameters()}
    assert parameter_counts(dense)[1] < parameter_counts(spiking)[1]
    with SpikeMonitor(dense) as monitor, torch.no_grad():
        dense(torch.randint(0, 30, (1, 8)))
    with pytest.warns(UserWarning, match="No module was taken for neurons"):
        assert monitor.rates() == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block": "other"}, "block must be 'published' or 'spike_fed', got 'other'"),
        ({"spiking_values": True}, "spiking_values=True needs block='spike_fed'"),
        (
            {"block": "spike_fed", "clamp_floor": -1.0},
            "clamp_floor needs block='published': no other block has a leaky clamp",
        ),
        ({"dense": True}, "dense=True needs one time step, t_fast=1 and t_slow=0, got 8 and 2"),
    ],
)
def test_inconsistent_configurations_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        NordConfig(**SMALL, **fields)


def test_unsupported_options_raise(tmp_path):
    model = NordForCausalLM(NordConfig(**{**SMALL, "recency": False}, block="spike_fed"))
    with pytest.raises(ValueError, match="the published code does not support block = spike_fed"):
        to_original(model)
    (tmp_path / "text.txt").write_text(make_text())
    config = write_config(tmp_path)
    config.write_text(config.read_text().replace("model:\n", "model:\n  dense: true\n"))
    with pytest.raises(SettingsError, match=r"use compare\.py"):
        settings_from(parse_arguments(["--config", str(config)]))
