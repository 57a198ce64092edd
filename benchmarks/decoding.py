"""Decoding at the size of the published Nord model (144 M parameters), float32, batch 1, with and without the cache."""

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

__all__ = ["PROMPT_LENGTHS", "Speed", "cache_bytes", "check", "firing_model", "measure"]

PROMPT_LENGTHS = (64, 500)  # tokens
MIN_FIRING_RATE = 0.1  # of the input neurons
ROUNDS = 3  # timed rounds, after a warm-up
NEW_TOKENS = {True: 12, False: 4}  # use_cache -> tokens to generate


class Speed(NamedTuple):
    """Median milliseconds until the first token, and for each later token."""

    first: float
    later: float


class TokenTimes(BaseStreamer):
    """Record the time of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Record the time: transformers calls this with the prompt, then with each new token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing at the end."""


def firing_model() -> NordForCausalLM:
    """Return a model with the architecture of the published Nord model and random weights.

    The embedding is scaled until the firing rate of the input neurons is at least 10 %. Without scaling it is 0.4 %, and the
    times would be too short, because the kernels take less time if fewer neurons fire.
    """
    torch.manual_seed(0)
    net = NordForCausalLM(NordConfig()).eval()
    ids = prompt(64)
    while True:
        with torch.no_grad(), SpikeMonitor(net) as monitor:
            net(input_ids=ids, logits_to_keep=1, use_cache=False)
        if monitor.rates()["input_lif"] >= MIN_FIRING_RATE:
            return net
        net.embed_tokens.weight.data.mul_(1.2)


def prompt(length: int) -> Tensor:
    """Return random token ids ``[1, length]`` from a fixed seed."""
    return torch.randint(NordConfig().vocab_size, (1, length), generator=torch.Generator().manual_seed(1))


def generate(
    net: NordForCausalLM, length: int, n: int, use_cache: bool, streamer: BaseStreamer | None = None
) -> Tensor:
    """Generate ``n`` tokens after a prompt of ``length`` tokens."""
    settings = {"max_new_tokens": n, "do_sample": False, "use_cache": use_cache, "pad_token_id": 0}
    return net.generate(prompt(length), streamer=streamer, **settings)


@torch.no_grad()
def check(net: NordForCausalLM) -> str:
    """Compare 16 logits and 4 generated tokens with the cache to those without it; return the difference, or exit."""
    ids = prompt(80)
    expected = net(input_ids=ids, logits_to_keep=16, use_cache=False).logits
    cache = cache_of(net(input_ids=ids[:, :64], logits_to_keep=1))
    worst = 0.0
    for position in range(64, 80):
        logits = net(input_ids=ids[:, position : position + 1], cache=cache).logits
        worst = max(worst, float((logits[:, 0] - expected[:, position - 64]).abs().max()))
    if worst > 1e-5:
        raise SystemExit(f"logits with the cache differ from those of a full forward pass by {worst:.1e}")
    if not torch.equal(generate(net, 64, 4, True), generate(net, 64, 4, False)):
        raise SystemExit("generation with the cache gives other tokens than without it")
    return f"logits within {worst:.1e} of those of a full forward pass, tokens equal"


def measure(net: NordForCausalLM) -> dict[tuple[int, bool], Speed]:
    """Time ``generate`` after prompts of each length, without and with the cache.

    A round has one call for each prompt length and cache setting. Returns the medians over the rounds by these two.
    """
    first: dict[tuple[int, bool], list[float]] = {(n, cache): [] for n in PROMPT_LENGTHS for cache in (False, True)}
    later: dict[tuple[int, bool], list[float]] = {key: [] for key in first}
    for round_number in range(ROUNDS + 1):
        for key in first:
            length, use_cache = key
            recorder, start = TokenTimes(), time.perf_counter()
            generate(net, length, NEW_TOKENS[use_cache], use_cache, recorder)
            _, *times = recorder.times  # the first time is that of the call with the prompt
            if round_number:  # the first round is a warm-up
                first[key].append(times[0] - start)
                later[key] += [after - before for before, after in itertools.pairwise(times)]
    return {key: Speed(1e3 * statistics.median(first[key]), 1e3 * statistics.median(later[key])) for key in first}


def cache_bytes(net: NordForCausalLM) -> int:
    """Return the bytes that a position takes in the cache, summed over all blocks."""
    with torch.no_grad():
        cache = cache_of(net(input_ids=prompt(16), logits_to_keep=1))
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values)) // 16
