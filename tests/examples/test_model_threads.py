"""One model is called from several threads, as a server does: no result belongs to another request."""

import pytest
import torch
from helpers import wrong_in_threads

from nord_snn.models.nord import NordConfig, NordForCausalLM

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "n_clusters": 4,
}


@pytest.mark.parametrize("calls", [20, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("block", ["published", "spike_fed"])
def test_four_threads_get_the_logits_of_one(block, calls):
    model = NordForCausalLM(NordConfig(**SMALL, block=block)).eval().requires_grad_(False)
    requests = [torch.randint(50, (1, length)) for length in (4, 7, 7, 12)]
    assert not wrong_in_threads(lambda tokens: model(input_ids=tokens).logits, requests, calls)


@pytest.mark.parametrize("block", ["published", "spike_fed"])
def test_four_threads_generate_what_one_generates(block):
    model = NordForCausalLM(NordConfig(**SMALL, block=block)).eval().requires_grad_(False)
    requests = [torch.randint(50, (1, length)) for length in (2, 3, 3, 5)]
    assert not wrong_in_threads(
        lambda tokens: model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0), requests, 4
    )
