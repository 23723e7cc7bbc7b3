"""The frozen records that flow between the stages.

    Prompt --rollout--> Completion --labels--> Verdict --> Rollout --batching--> Sequence

Every stage consumes records of one kind and produces records of the next; nothing is a dict batch. Loadable without
torch, so that prompts and labels can be tested and used on their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "wrong", "unparsable", "timeout", "crashed", "overlong", "empty", "lost", "score", "mismatch"]
"""What became of one check.

`ok` and `wrong` are verdicts on the answer; `unparsable` means that no answer could be read from the completion;
`timeout` and `crashed` mean that the check itself failed; `overlong` that the completion was cut at the length limit;
`empty` that it has no token; `lost` that no engine could finish it; `score` that a verifier gave a number for a
threshold to judge; `mismatch` that trainer and engine disagreed on its log-probs beyond rollout.exclude_mismatch,
whatever the check said.
"""

POSITIVE = 1
"""Label of a verified correct rollout."""
NEGATIVE = 0
"""Label of a verified wrong rollout."""
EXCLUDED = -1
"""Label of a rollout that leaves its group: no loss, no weight, in no sum."""


@dataclass(frozen=True)
class Prompt:
    """One question, rendered by the chat template and tokenised.

    Example: Prompt(uid="train/17", text="<|user|>2+3=<|assistant|>", token_ids=(5, 9, 12, 10, 7), answers=("5",))
    """

    uid: str
    """Stable identity of the dataset row: "<source>/<row number>"."""
    text: str
    """The rendered prompt, as the model sees it."""
    token_ids: tuple[int, ...]
    """[prompt tokens] ids of `text`."""
    answers: tuple[str, ...]
    """[1..] accepted gold answers."""
    source: str = ""
    """The row's data_source: names the benchmark and may select the verifier."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The row's extra_info, untouched."""


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn from the policy."""

    num_samples: int
    """Completions per prompt (G in training)."""
    temperature: float
    """Divides the logits; > 0."""
    max_tokens: int
    """Limit of response tokens, the end-of-sequence token included."""
    top_p: float = 1.0
    """Nucleus mass. 1 in training: anything less makes the trainer's log-probs biased."""
    top_k: int = 0
    """Number of most likely tokens kept; 0 keeps all."""


@dataclass(frozen=True)
class Completion:
    """One sampled answer, as an engine returns it."""

    token_ids: tuple[int, ...]
    """[n] response tokens, with the end-of-sequence token when one was produced."""
    logprobs: tuple[float, ...]
    """[n] the engine's own log-probs (nats) of the sampling distribution; only measures the train/engine mismatch."""
    text: str
    """Decoded response without special tokens."""
    finished: bool
    """True when it ended by an end-of-sequence token, False when it was cut at the limit."""


@dataclass(frozen=True)
class Verdict:
    """What a verifier said of one completion."""

    status: Status
    """What became of the check."""
    label: int
    """POSITIVE, NEGATIVE or EXCLUDED."""
    reward: float | None
    """1.0 or 0.0 from a binary verifier, its number from a scoring one, None where the check failed."""
    seconds: float = 0.0
    """Wall-clock time of the check; 0 where no verifier saw the completion."""
    reason: str = ""
    """Why there is no verdict, where the check failed or the completion was lost."""
    early: bool = False
    """True when the check was over before the engine of its rank had finished its last completion."""


@dataclass(frozen=True)
class Rollout:
    """One labelled completion of one prompt."""

    prompt: Prompt
    group: int
    """Index of the prompt within its step: rollouts of equal `group` form one group."""
    sample: int
    """Index within the group, 0..G-1."""
    completion: Completion
    verdict: Verdict
    refills: int = 0
    """Prompts that were drawn for this group before, and given up because their rollouts were of one class."""

    @property
    def label(self) -> int:
        """POSITIVE, NEGATIVE or EXCLUDED."""
        return self.verdict.label

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens together."""
        return len(self.prompt.token_ids) + len(self.completion.token_ids)
