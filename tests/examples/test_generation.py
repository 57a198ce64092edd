"""Decoding with a cache gives the logits, spikes and tokens of decoding without a cache."""

import inspect

import pytest
import torch
from helpers import make_text
from nordlm.data.tokenizer import train_tokenizer
from transformers import DynamicCache, EncoderDecoderCache, LlamaForCausalLM, pipeline
from transformers.utils import TransformersKwargs

from nord_snn._compat.transformers import CACHE, cache_of
from nord_snn.models.nord import NordConfig
from nord_snn.models.nord.modeling_nord import NOT_OFFERED, NordForCausalLM
from nord_snn.neurons import AssociativeLIFNode

#: With so few neurons and time steps many scores are equal, so that top-k has to break ties.
CONFIGS = [
    {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "n_clusters": 4, "top_k": 5},
    {
        "hidden_size": 36,
        "num_attention_heads": 3,
        "intermediate_size": 20,
        "n_clusters": None,
        "recency": True,
        "top_k": 7,
    },
    {"hidden_size": 40, "num_attention_heads": 4, "intermediate_size": 48, "n_clusters": 8, "t_fast": 5, "t_slow": 0},
]


def make(number: int = 0, layers: int = 3, positions: int = 32, **fields) -> NordForCausalLM:
    """Return a model with ``CONFIGS[number]`` whose neurons fire and whose output depends on earlier positions."""
    torch.manual_seed(number)
    settings = {"vocab_size": 50, "num_hidden_layers": layers, "max_position_embeddings": positions, "fast_scale": 40.0}
    model = NordForCausalLM(NordConfig(**{**settings, **CONFIGS[number], **fields})).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.ffn_gain.fill_(0.5)
            block.ffn.down.weight.mul_(10)
            if block.resonance is not None:
                block.resonance_gain.fill_(1.0)
                block.resonance.q_proj.weight.mul_(2)
                block.resonance.k_proj.weight.mul_(2)
    return model


class SpikeRecorder:
    """Recorder of the spikes of every layer of neurons, by position."""

    def __init__(self, model: NordForCausalLM) -> None:
        self.fired: dict[str, list[torch.Tensor]] = {}
        for name, module in model.named_modules():
            if isinstance(module, AssociativeLIFNode):
                module.register_forward_hook(lambda _, __, out, name=name: self.fired.setdefault(name, []).append(out))

    def take(self) -> dict[str, torch.Tensor]:
        """Return all recorded spikes ``[T, B, S, D]`` and clear the recording."""
        whole = {name: torch.cat(parts, 2) for name, parts in self.fired.items()}
        self.fired.clear()
        return whole


@pytest.mark.parametrize("number", range(len(CONFIGS)))
@pytest.mark.parametrize("pieces", [[1] * 20, [13, 1, 1, 5], [19, 1]])
@torch.no_grad()
def test_logits_and_spikes_of_cached_decoding_equal_those_of_a_full_forward_pass(number, pieces):
    """Every position and layer is compared; two sequences have padding in front."""
    model = make(number)
    ids = torch.randint(50, (3, 20))
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[1, :4], mask[2, :9] = 0, 0
    spikes = SpikeRecorder(model)
    whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    expected = spikes.take()
    assert all(0.01 < fired.mean() < 0.5 for fired in expected.values())
    past, logits, end = None, [], 0
    for length in pieces:
        end += length
        out = model(input_ids=ids[:, end - length : end], attention_mask=mask[:, :end], cache=past, use_cache=True)
        past = cache_of(out)
        logits.append(out.logits)
    tokens = mask.bool()
    assert torch.allclose(torch.cat(logits, 1)[tokens], whole[tokens], atol=1e-5)
    flips = sum(int((fired != expected[name])[:, tokens].sum()) for name, fired in spikes.take().items())
    assert flips == 0
    assert all(layer.keys.dtype == torch.uint8 for layer in past.layers)
    for row, start in ((0, 0), (1, 4), (2, 9)):  # without padding the logits are the same
        alone = model(input_ids=ids[row : row + 1, start:], use_cache=False).logits
        assert torch.allclose(whole[row, start:], alone[0], atol=1e-5)


DECODING = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.5},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("decoding", DECODING)
@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_generate_gives_the_same_tokens_with_and_without_cache(decoding, number):
    model = make(number)
    ids = torch.randint(1, 50, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    results = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        results.append(
            model.generate(
                ids, attention_mask=mask, max_new_tokens=15, use_cache=use_cache, pad_token_id=0, **DECODING[decoding]
            )
        )
    assert torch.equal(*results)
    assert results[0][:, 9:].unique().numel() > 3
    if decoding == "greedy":
        alone = model.generate(ids[1:, 5:], max_new_tokens=15, pad_token_id=0)
        assert torch.equal(results[0][1, 9:], alone[0, 4:])


def test_the_cache_is_accepted_under_either_name_but_not_both():
    """In transformers the name is ``past_key_values`` up to 5.23 and ``cache`` since 5.24."""
    model = make()
    ids = torch.randint(50, (2, 9))
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits[:, -1]
        for name in ("cache", "past_key_values"):
            past = cache_of(model(input_ids=ids[:, :-1]))
            assert past.get_seq_length() == 8
            assert torch.allclose(model(input_ids=ids[:, -1:], **{name: past}).logits[:, -1], whole, atol=1e-5)
    with pytest.raises(TypeError, match="pass either cache or past_key_values"):
        model(input_ids=ids, cache=past, past_key_values=past)


def test_keywords_are_used_or_raise_with_their_name():
    model = make()
    ids = torch.randint(50, (2, 9))
    with pytest.raises(TypeError, match="got an unknown keyword 'nobody_knows_this'"):
        model(input_ids=ids, nobody_knows_this=1)
    with pytest.raises(TypeError, match="'atention_mask'"):
        model(input_ids=ids, atention_mask=None)
    for name in NOT_OFFERED:
        assert torch.equal(model(input_ids=ids, **{name: None}).logits, model(input_ids=ids).logits)
        with pytest.raises(ValueError, match=f"does not support {name}: "):
            model(input_ids=ids, **{name: torch.ones(2, 9)})
    for call in ({}, {"input_ids": ids, "inputs_embeds": model.embed_tokens(ids)}):
        with pytest.raises(TypeError, match="either input_ids"):
            model(**call)
    with pytest.raises(ValueError, match=r"inputs_embeds must be floating \[B, S, D\] with D = 16"):
        model(inputs_embeds=torch.zeros(2, 9, 15))
    assert torch.equal(model(inputs_embeds=model.embed_tokens(ids)).logits, model(input_ids=ids).logits)
    logits = model(input_ids=ids).logits
    assert torch.allclose(
        model(input_ids=ids, logits_to_keep=torch.tensor([1, 4])).logits, logits[:, [1, 4]], atol=1e-6
    )
    assert torch.allclose(model(input_ids=ids, logits_to_keep=3).logits, logits[:, -3:], atol=1e-6)
    for wrong in (-1, torch.tensor([0.5]), 1.5, True, None, "3"):
        with pytest.raises((TypeError, ValueError), match="logits_to_keep must be"):
            model(input_ids=ids, logits_to_keep=wrong)
    with pytest.raises(ValueError, match="logits of every position"):
        model(input_ids=ids, labels=ids, logits_to_keep=1)
    loss = model(input_ids=ids, labels=ids).loss
    assert torch.allclose(model(input_ids=ids, labels=ids, num_items_in_batch=32).loss, loss * 16 / 32)


def test_every_keyword_of_llama_in_transformers_is_accepted_or_raises_with_its_name():
    """The test fails if a new release of transformers adds a keyword."""
    of_llama = set(inspect.signature(LlamaForCausalLM.forward).parameters) | set(TransformersKwargs.__annotations__)
    of_nord = set(inspect.signature(NordForCausalLM.forward).parameters) | set(NOT_OFFERED)
    assert of_llama - of_nord <= {"kwargs"}


def test_generate_accepts_embeddings():
    model = make()
    ids = torch.randint(1, 50, (2, 9))
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    embedded = model.embed_tokens(ids)
    got = model.generate(inputs_embeds=embedded, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(got, expected[:, 9:])


def test_a_pipeline_generates_the_same_with_and_without_a_cache():
    tokenizer = train_tokenizer([make_text(400)], 300)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    model = make(vocab_size=len(tokenizer), positions=64)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["the neuron fires and rests", "a spike"]
    written = [
        write(prompts, max_new_tokens=12, do_sample=False, use_cache=use_cache, batch_size=2)
        for use_cache in (True, False)
    ]
    assert written[0] == written[1]
    lengths = []
    model.embed_tokens.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    (alone,) = write(prompts[1], max_new_tokens=4, do_sample=False)
    assert lengths[1:] == [1] * 3  # the cache is used
    assert written[0][1][0]["generated_text"].startswith(alone["generated_text"])  # padding changes nothing


def test_assisted_decoding_gives_the_same_tokens_and_ends_within_the_window():
    model, assistant = make(1), make(1, layers=1)
    ids = torch.randint(1, 50, (1, 9))
    plain = model.generate(ids, max_new_tokens=23, do_sample=False, use_cache=False, pad_token_id=0)
    assisted = model.generate(ids, max_new_tokens=23, do_sample=False, assistant_model=assistant, pad_token_id=0)
    assert torch.equal(plain, assisted)
    with pytest.raises(ValueError, match="within max_position_embeddings = 32, got max_length 33"):
        model.generate(ids, max_new_tokens=24, do_sample=False, assistant_model=assistant, pad_token_id=0)


@pytest.mark.quick
def test_generation_with_a_cache_computes_only_new_tokens():
    model = make()
    lengths = []
    model.embed_tokens.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    model.generate(torch.randint(1, 50, (1, 9)), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert lengths == [9, 1, 1, 1, 1]


@pytest.mark.parametrize("prompt", [5, 12, 30])
def test_beyond_the_window_cached_decoding_is_exact_for_one_block_only(prompt):
    """With more blocks, cached keys still depend on positions that have left the window."""
    for layers in (1, 3):
        model = make(1, layers=layers, positions=12)
        ids = torch.randint(1, 50, (1, prompt))
        cached, recomputed = (
            model.generate(ids, max_new_tokens=25, do_sample=False, use_cache=use_cache, pad_token_id=0)
            for use_cache in (True, False)
        )
        within = max(13, prompt + 1)  # up to the token that follows a full window of 12
        assert torch.equal(cached[:, :within], recomputed[:, :within])
        if layers == 1:
            assert torch.equal(cached, recomputed)


@torch.no_grad()
def test_the_cache_is_never_longer_than_the_window():
    model = make(positions=12)
    past = cache_of(model(input_ids=torch.randint(50, (1, 12))))
    for _ in range(5):
        past = cache_of(model(input_ids=torch.randint(50, (1, 1)), cache=past))
    assert past.get_seq_length() == 17
    assert {layer.keys.shape[2] for layer in past.layers} == {11}  # the window of 12 without the next position
    assert past.layers[0].keys.shape == (1, 2, 11, 24)  # 10 time steps of 16 bits, padded to words of 64 bits: 24 bytes


def test_without_resonance_generation_with_and_without_a_cache_gives_the_same_tokens():
    model = make(resonance=False)
    ids = torch.randint(1, 50, (2, 6))
    assert torch.equal(
        *(
            model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=use, pad_token_id=0)
            for use in (True, False)
        )
    )


def test_a_cache_is_created_only_if_requested():
    model = make()
    ids = torch.randint(50, (1, 6))
    assert cache_of(model(input_ids=ids)) is not None
    assert cache_of(model(input_ids=ids, labels=ids)) is None
    assert cache_of(model(input_ids=ids, use_cache=False)) is None
    assert cache_of(model.train()(input_ids=ids)) is None
    past = cache_of(model(input_ids=ids, use_cache=True))
    with pytest.raises(RuntimeError, match=r"under torch.no_grad\(\)"):
        model(input_ids=ids[:, :1], cache=past)


def test_prompt_lookup_gives_the_same_tokens_and_ends_within_the_window():
    model = make(1)
    ids = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3]])
    plain, looked_up = (
        model.generate(ids, max_new_tokens=21, do_sample=False, pad_token_id=0, **decoding)
        for decoding in ({}, {"prompt_lookup_num_tokens": 3})
    )
    assert torch.equal(plain, looked_up)
    with pytest.raises(ValueError, match="within max_position_embeddings = 32, got max_length 33"):
        model.generate(ids, max_new_tokens=22, do_sample=False, prompt_lookup_num_tokens=3, pad_token_id=0)


def test_caches_that_change_their_contents_raise():
    model = make()
    ids = torch.randint(1, 50, (1, 6))
    with pytest.raises(
        ValueError, match="must be a DynamicCache whose layers store keys and values unchanged, got StaticCache"
    ):
        model.generate(ids, max_new_tokens=3, cache_implementation="static", pad_token_id=0)
    with pytest.raises(
        ValueError, match="must be a DynamicCache whose layers store keys and values unchanged, got tuple"
    ):
        model(input_ids=ids, cache=((ids, ids),))
    with pytest.raises(ValueError, match="got EncoderDecoderCache"):
        model(input_ids=ids, cache=EncoderDecoderCache(DynamicCache(), DynamicCache()))
    with pytest.raises(ValueError, match="window of max_position_embeddings = 32 positions, got 7"):
        model(input_ids=ids, cache=DynamicCache(config=make(positions=7).config))


def test_a_dynamic_cache_without_configuration_has_the_window_of_the_model():
    """Such a cache stores all positions; the model attends to those of the window."""
    model = make(1, positions=12)
    ids = torch.randint(1, 50, (1, 8))
    tokens = [
        model.generate(ids, max_new_tokens=15, do_sample=False, pad_token_id=0, **{CACHE: past})
        for past in (DynamicCache(), None)
    ]
    assert torch.equal(*tokens)


@torch.no_grad()
def test_invalid_masks_raise():
    model = make()
    ids = torch.randint(50, (1, 6))
    past = cache_of(model(input_ids=ids))
    with pytest.raises(ValueError, match=r"\[B, 6 cached \+ S\] = \[1, 7\], got \[1, 1\]"):
        model(input_ids=ids[:, :1], cache=past, attention_mask=torch.ones(1, 1))
    with pytest.raises(ValueError, match="got padding between tokens"):
        model(input_ids=ids, attention_mask=torch.tensor([[1, 1, 0, 1, 1, 1]]))
    wider = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match=r"the shape of input_ids, \[1, 6\], got \[1, 8\]"):
        model.generate(ids, attention_mask=wider, max_new_tokens=8, pad_token_id=0)
    with pytest.raises(ValueError, match="got padding between tokens"):  # padding after the prompt, then tokens
        model.generate(ids, attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0]]), max_new_tokens=3, pad_token_id=0)


def test_prompt_tuning_of_peft_trains_its_prompt_and_generates():
    """Tuning passes the prompt and the tokens as inputs_embeds."""
    peft = pytest.importorskip("peft")
    model = make()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = peft.get_peft_model(model, config)
    ids = torch.randint(20, (2, 9))
    tuned(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    trained = {
        name for name, parameter in tuned.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert len(trained) == 1
    assert "prompt" in trained.pop()
    tuned.eval()
    assert tuned.generate(input_ids=ids, max_new_tokens=4, do_sample=False).shape == (2, 13)
