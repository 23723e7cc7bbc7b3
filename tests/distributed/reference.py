"""The invariance matrix's reference: transformers' model and Eq. 8 as printed.
Imports nothing from megatron_real.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TAU = 0.5
TEMPERATURE = 0.6


@dataclass(frozen=True)
class Sample:
    """One rollout: token ids, label (1, 0 or -1 for excluded) and group."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    label: int
    group: int
    trained: tuple[bool, ...] | None = None
    """Of each response token; None: all are. The others are context, as a tool's output is."""


def minibatch(seed: int, vocab: int) -> list[Sample]:
    """Unequal lengths, groups of unequal size and label counts, an excluded rollout, a one-class
    group, a wholly excluded group, a one-token response; in shuffled order. With an even seed,
    longer responses have spans in their middle that are not trained, and some end with one.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = {
        3: (1, 0, 0, 1, 0),
        7: (1, -1, 0),
        1: (1, 1, 1),
        4: (-1, -1),
        9: (0, 1, 0, 0, 0, 0, 1),
    }

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, vocab, (n,), generator=generator).tolist())

    def length(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    samples = []
    for group, members in labels.items():
        prompt = tokens(length(2, 9))
        for i, label in enumerate(members):
            # The second response of each group has one token.
            num_tokens = 1
            if i != 1:
                num_tokens = length(2, 15)
            response = tokens(num_tokens)
            trained = None
            if seed % 2 == 0:
                trained = _masked(num_tokens)
            samples.append(Sample(prompt, response, label, group, trained))

    order = torch.randperm(len(samples), generator=generator).tolist()
    return [samples[i] for i in order]


def _masked(length: int) -> tuple[bool, ...]:
    """Trained tokens at both ends of a response of 4 and more,
    one in the middle of a longer one.
    """
    trained = [True] * length
    if length >= 4:
        trained[1 : length - 1] = [False] * (length - 2)
    if length >= 7:
        trained[length // 2] = True
    if length >= 10:
        trained[-2:] = [True, False]
    return tuple(trained)


def load(path: Path, dtype: torch.dtype = torch.float64) -> Any:
    """transformers' model; in float64 also where transformers always computes in float32:
    rotary angles and norms.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
    if dtype == torch.float64:
        inv_freq = model.model.rotary_emb.inv_freq.double()
        model.model.rotary_emb.forward = lambda _, position_ids: _cos_sin(
            position_ids[..., None] * inv_freq
        )
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = partial(_rms_norm, module)
    return model


def _cos_sin(angle: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()


def _rms_norm(module: Any, x: Tensor) -> Tensor:
    return module.weight * x * (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()


def logprobs(model: Any, sample: Sample) -> Tensor:
    """[n] log pi of each trained response token, logits divided by the sampling temperature."""
    ids = torch.tensor([sample.prompt + sample.response])
    logits = model(ids).logits[0, len(sample.prompt) - 1 : -1] / TEMPERATURE
    logprob = logits.log_softmax(-1).gather(1, torch.tensor(sample.response)[:, None])[:, 0]
    if sample.trained is None:
        return logprob
    return logprob[torch.tensor(sample.trained)]


def loss(scores: list[Tensor], samples: list[Sample]) -> Tensor:
    """Eq. 8, averaged over the groups with a labelled rollout;
    one-class groups give no loss but count.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for i, sample in enumerate(samples):
        if sample.label != -1:
            groups[sample.group].append(i)

    zero = torch.zeros((), dtype=torch.float64)
    total = zero
    for members in groups.values():
        positive = [i for i in members if samples[i].label == 1]
        negative = [i for i in members if samples[i].label == 0]
        if positive and negative:
            positive_sum = sum((torch.exp(-scores[i] / TAU) for i in positive), start=zero)
            negative_sum = sum((torch.exp(scores[j] / TAU) for j in negative), start=zero)
            total = total + torch.log(1 + positive_sum) + torch.log(1 + negative_sum)
    # The groups of one class count in the denominator.
    return total / len(groups)


def gradient(
    path: Path, old_path: Path | None, samples: list[Sample]
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of every parameter at the weights of `path`,
    rollouts drawn by those of `old_path` (None: by `path` itself).
    """
    model = load(path)
    old = load(old_path or path)
    scores = []
    for sample in samples:
        with torch.no_grad():
            old_logprob = logprobs(old, sample)
        scores.append((logprobs(model, sample) - old_logprob).mean())

    value = loss(scores, samples)
    value.backward()
    return float(value), {name: p.grad for name, p in model.named_parameters()}
