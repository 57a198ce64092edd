"""NordConfig and the model raise for wrong names and values, and name the nearest correct name."""

import dataclasses
import json
import math
from contextlib import suppress

import pytest
import torch
from helpers import CONFIG
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from nord_snn.models.nord import NordConfig, NordForCausalLM

pytestmark = pytest.mark.quick

SMALL = CONFIG["model"]
FIELDS = [field.name for field in dataclasses.fields(NordConfig)]


@pytest.fixture
def ids():
    return torch.randint(300, (1, 5))


@pytest.fixture
def saved(tmp_path):
    """Return the folder of a model whose resonance selects 3 keys."""
    NordForCausalLM(NordConfig(**SMALL, top_k=3)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("name", "meant"),
    [("refractory_step", "refractory_steps"), ("vocab_sze", "vocab_size"), ("thresold", "threshold"), ("foo", None)],
)
def test_an_unknown_field_raises_with_the_nearest_name(name, meant):
    with pytest.raises(TypeError, match=f"no field '{name}'" + (rf": did you mean {meant}\?" if meant else "$")):
        NordConfig(**SMALL, **{name: 1})


@given(name=st.sampled_from(FIELDS), place=st.integers(0, 40), bit=st.integers(0, 6))
@settings(max_examples=200, deadline=None)
def test_a_field_with_one_flipped_bit_in_its_name_raises(name, place, bit):
    place %= len(name)
    damaged = name[:place] + chr(ord(name[place]) ^ 1 << bit) + name[place + 1 :]
    with pytest.raises(TypeError, match="has no field"):
        NordConfig(**{**SMALL, damaged: NordConfig.__dict__.get(name, 0)})


@pytest.mark.parametrize("load", [NordConfig, AutoConfig, NordForCausalLM, AutoModelForCausalLM])
def test_a_misspelt_field_raises_while_loading(load, saved):
    with pytest.raises(TypeError, match="did you mean refractory_steps"):
        load.from_pretrained(saved, refractory_step=0)


def test_common_attributes_of_transformers_are_accepted(saved):
    for field in dataclasses.fields(PreTrainedConfig):
        NordConfig(**SMALL, **{field.name: field.default})
    common = {"num_labels": 3, "torch_dtype": "bfloat16", "output_attentions": False, "attn_implementation": "eager"}
    config = NordConfig(**SMALL, **common, name_or_path="mine", architectures=["NordForCausalLM"])
    assert (config.num_labels, config.dtype, config.name_or_path) == (3, torch.bfloat16, "mine")
    assert NordConfig(**config.to_dict()).to_dict() == config.to_dict()
    assert json.loads((saved / "config.json").read_text())["auto_map"]
    loaded = AutoConfig.from_pretrained(saved, threshold=0.5, padding_side="left")  # a tokenizer's keyword
    assert loaded.threshold == 0.5
    assert NordForCausalLM.from_pretrained(saved, dtype="float64").dtype == torch.float64


@pytest.mark.parametrize("parameter", ["temperature", "max_length", "do_sample"])
def test_a_parameter_of_generate_in_the_configuration_raises(parameter):
    with pytest.raises(TypeError, match=rf"{parameter} is a parameter of generate\(\)"):
        NordConfig(**SMALL, **{parameter: 7})


WRONG_VALUES = {
    "v_reset": math.nan,
    "alpha": math.inf,
    "threshold": math.nan,
    "fast_scale": -math.inf,
    "layer_norm_eps": -1.0,
    "beta_mem": 1.0,
    "refractory_steps": 2**31,
    "cascade_radius": 10**30,
    "t_slow": 10**30,
    "num_hidden_layers": 100_000,
    "t_fast": 100_000_000,
    "n_clusters": -4,
    "backend": "nonsense",
    "dtype": "nonsense",
    "torch_dtype": "load",
    "is_encoder_decoder": True,
    "output_hidden_states": True,
    "output_attentions": True,
    "return_dict": "no",
    "id2label": 5,
    "label2id": 5,
    "num_labels": 10**10,
    "architectures": 5,
    "chunk_size_feed_forward": -3,
    "per_layer_config": 5,
    "attn_implementation": "someone/kernel",
    "experts_implementation": "someone/kernel",
    "model_type": "gpt2",
    "eos_token_id": 300,
    "pad_token_id": -1,
    "bos_token_id": [1],
}


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_a_wrong_value_raises_with_the_name_of_its_field(name):
    with pytest.raises((ValueError, TypeError, StrictDataclassError), match=name.removeprefix("torch_")):
        NordConfig(**{**SMALL, name: WRONG_VALUES[name]})


ANY_VALUE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@given(name=st.sampled_from(FIELDS), value=ANY_VALUE)
@settings(max_examples=300, deadline=None)
def test_any_value_raises_or_survives_a_round_trip_through_a_dict(name, value):
    with suppress(ValueError, TypeError, StrictDataclassError):
        config = NordConfig(**{**SMALL, name: value})
        assert NordConfig(**config.to_dict()).to_dict() == config.to_dict()


HUGE_SIZES = {"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 2**10, "intermediate_size": 2**31 - 2**10}


@pytest.mark.parametrize("name", HUGE_SIZES)
def test_a_model_that_does_not_fit_is_refused_with_its_size(name):
    published = NordConfig(**{name: HUGE_SIZES[name]})
    with pytest.raises(ValueError, match=rf"does not fit into the memory of [\d,.]+ GB: .*{name} {HUGE_SIZES[name]}"):
        NordForCausalLM(published)


def test_the_size_is_not_checked_on_the_meta_device_which_uses_no_memory():
    with torch.device("meta"):
        assert NordForCausalLM(NordConfig(vocab_size=2**31 - 1, num_hidden_layers=1)).device.type == "meta"


def test_a_misspelt_keyword_of_the_model_raises(ids):
    model = NordForCausalLM(NordConfig(**SMALL))
    with pytest.raises(TypeError, match="'atention_mask': did you mean attention_mask"):
        model(ids, atention_mask=torch.ones_like(ids))
    with pytest.raises(ValueError, match="atention_mask"):
        model.generate(ids, atention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("load", [NordForCausalLM, AutoModelForCausalLM])
@pytest.mark.parametrize("with_file", [True, False])
def test_the_top_k_of_the_resonance_is_not_that_of_sampling(load, with_file, saved, tmp_path):
    """Without generation_config.json, transformers reads parameters of ``generate`` from config.json."""
    if not with_file:
        (saved / "generation_config.json").unlink()
    for keywords, top_k in (({}, 3), ({"top_k": 4}, 4)):
        model = load.from_pretrained(saved, **keywords)
        assert (model.config.top_k, model.generation_config.top_k) == (top_k, None)
        model.save_pretrained(tmp_path / "again")
        assert "top_k" not in json.loads((tmp_path / "again" / "generation_config.json").read_text())


@pytest.mark.parametrize("with_file", [True, False])
def test_other_parameters_of_generate_are_still_loaded(with_file, saved):
    content = {"temperature": 0.5, "top_k": 7}
    if with_file:
        (saved / "generation_config.json").write_text(json.dumps(content))
        with pytest.warns(UserWarning, match=r"generation_config.json is damaged, or was changed"):
            assert NordForCausalLM.from_pretrained(saved).generation_config.top_k == 7
        (saved / "checksums.json").unlink()
    else:
        (saved / "generation_config.json").unlink()
    model = NordForCausalLM.from_pretrained(saved, eos_token_id=5, top_k=4)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 5
    assert model.generation_config.top_k == (7 if with_file else None)


def test_a_folder_with_another_model_type_raises(saved):
    content = json.loads((saved / "config.json").read_text()) | {"model_type": "gpt2"}
    (saved / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="model_type must be 'nord'"):
        NordForCausalLM.from_pretrained(saved)


def test_the_tokenizer_in_a_model_folder_is_loaded(saved, trained):
    """AutoTokenizer passes its keywords to the configuration of the model."""
    for file in (trained / "tokenizer").iterdir():
        (saved / file.name).write_bytes(file.read_bytes())
    keywords = {"padding_side": "left", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "use_fast": True}
    assert AutoTokenizer.from_pretrained(saved, **keywords).padding_side == "left"
