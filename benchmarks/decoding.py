"""Decoding at the published size (144 M parameters), float32, batch 1, with and without the cache."""

import itertools
import statistics
import time
from typing import NamedTuple

import torch
from language_model import NordConfig, NordForCausalLM
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from nord_snn._compat.transformers import cache_of
from nord_snn.monitor import SpikeMonitor

__all__ = ["CONTEXTS", "Speed", "cache_bytes", "firing_model", "gate", "measure"]

CONTEXTS = (64, 500)
TARGET_RATE = 0.1
TURNS = 3
NEW_TOKENS = {True: 12, False: 4}  # with the cache, without


class Speed(NamedTuple):
    """Milliseconds until the first token, and for each one after it (medians)."""

    first: float
    each: float


class Clock(BaseStreamer):
    """When each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """A token, or the prompt before all others."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing more comes."""


def firing_model() -> NordForCausalLM:
    """The published size with new weights, the embedding scaled until a tenth of the input neurons fires.

    As initialised it is nearly silent, and what is silent is fast.
    """
    torch.manual_seed(0)
    net = NordForCausalLM(NordConfig()).eval()
    ids = prompt(64)
    while True:
        with torch.no_grad(), SpikeMonitor(net) as monitor:
            net(input_ids=ids, logits_to_keep=1, use_cache=False)
        if monitor.rates()["input_lif"] >= TARGET_RATE:
            return net
        net.embed_tokens.weight.data.mul_(1.2)


def prompt(length: int) -> Tensor:
    """Always the same tokens ``[1, length]``."""
    return torch.randint(NordConfig().vocab_size, (1, length), generator=torch.Generator().manual_seed(1))


def generate(
    net: NordForCausalLM, length: int, n: int, use_cache: bool, streamer: BaseStreamer | None = None
) -> Tensor:
    """``n`` tokens behind a prompt."""
    settings = {"max_new_tokens": n, "do_sample": False, "use_cache": use_cache, "pad_token_id": 0}
    return net.generate(prompt(length), streamer=streamer, **settings)


@torch.no_grad()
def gate(net: NordForCausalLM) -> str:
    """Compare the logits behind a prompt, taken token by token from the cache, with those of one pass over all of it."""
    ids = prompt(80)
    whole = net(input_ids=ids, logits_to_keep=16, use_cache=False).logits
    past = cache_of(net(input_ids=ids[:, :64], logits_to_keep=1))
    worst = 0.0
    for at in range(64, 80):
        logits = net(input_ids=ids[:, at : at + 1], cache=past).logits
        worst = max(worst, float((logits[:, 0] - whole[:, at - 64]).abs().max()))
    if worst > 1e-5:
        raise SystemExit(f"correctness gate: logits from the cache are off by {worst:.1e}")
    if not torch.equal(generate(net, 64, 4, True), generate(net, 64, 4, False)):
        raise SystemExit("correctness gate: other tokens with the cache than without")
    return f"logits within {worst:.1e} of a full forward pass, identical tokens"


def measure(net: NordForCausalLM) -> dict[tuple[int, bool], Speed]:
    """Times of ``generate`` as its user sees them, behind prompts of each length, with a cache and without; all take turns."""
    first: dict[tuple[int, bool], list[float]] = {(n, cache): [] for n in CONTEXTS for cache in (False, True)}
    gaps: dict[tuple[int, bool], list[float]] = {key: [] for key in first}
    for turn in range(TURNS + 1):
        for key in first:
            length, use_cache = key
            clock, began = Clock(), time.perf_counter()
            generate(net, length, NEW_TOKENS[use_cache], use_cache, clock)
            _, *tokens = clock.times  # the first is the prompt's
            if turn:  # the first time, some things are done that are only done once
                first[key].append(tokens[0] - began)
                gaps[key] += [later - earlier for earlier, later in itertools.pairwise(tokens)]
    return {key: Speed(1e3 * statistics.median(first[key]), 1e3 * statistics.median(gaps[key])) for key in first}


def cache_bytes(net: NordForCausalLM) -> int:
    """What a position takes in the cache."""
    with torch.no_grad():
        past = cache_of(net(input_ids=prompt(16), logits_to_keep=1))
    return sum(x.numel() * x.element_size() for layer in past.layers for x in (layer.keys, layer.values)) // 16
