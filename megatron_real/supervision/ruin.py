"""Weights that no longer compute: found before they reach an engine, a checkpoint or an export.

A diverging update may leave every weight finite and still so large that the model's output is not.
An engine then fails in a way that looks like an accident, and a checkpoint of such weights would be
taken up again and again.
"""

from __future__ import annotations

import math

import torch

from megatron_real.errors import ExpectedEnd
from megatron_real.parallel.ranks import Ranks
from megatron_real.policy.policy import Policy
from megatron_real.records import POSITIVE, Completion, Prompt, Rollout, Status, Verdict

_PROBE_TOKENS = 8


class NonFinite(ExpectedEnd, RuntimeError):
    """The policy is ruined: its weights, its output or too many updates in a row are not finite."""

    diverged = True


def ruin(policy: Policy, ranks: Ranks) -> str:
    """Returns what of the policy is not finite, "" if it is sound.

    It reads all weights once and computes the log-probs of a few tokens. Collective; the answer is
    the same on every rank.
    """
    # Under overlap_param_gather the weights are old until the next pass.
    policy.gather_parameters()
    names = []
    finite = []
    for chunk in policy.chunks:
        for name, parameter in chunk.named_parameters():
            names.append(name)
            finite.append(torch.isfinite(parameter).all())

    # One copy to the host for all of them.
    own = ""
    for name, sound in zip(names, torch.stack(finite).tolist(), strict=True):
        if not sound:
            own = f"{name} on rank {ranks.rank}"
            break
    for weight in ranks.gathered_if_any(own):
        if weight:
            return f"the weight {weight}"

    # Any tokens will do: what overflows does so whatever is asked.
    tokens = tuple(i % policy.architecture.vocab_size for i in range(_PROBE_TOKENS))
    prompt = Prompt("probe", "", tokens, ("",))
    # Log-probs of 0, so that a difference is finite exactly where the policy's own are.
    completion = Completion(tokens, (0.0,) * len(tokens), "", True)
    probe = Rollout(prompt, 0, 0, completion, Verdict(Status.OK, POSITIVE, None))
    (difference,) = policy.mismatch([probe])
    if not math.isfinite(difference):
        return "the log-probs that its weights give"

    return ""
