"""The frozen records that flow between the stages.

    Prompt --rollout--> Completion --labels--> Verdict --> Rollout --batching--> Sequence

Every stage consumes records of one kind and produces records of the next; nothing is a dict batch.
The module loads without torch, so that prompts and labels can be tested and used on their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum, IntEnum
from typing import Any

import numpy
from numpy.typing import NDArray

TokenIds = NDArray[numpy.int32]
Logprobs = NDArray[numpy.floating[Any]]
TokenMask = NDArray[numpy.bool_]

UNKNOWN_VERSION = -1
"""The weight version of a token of which nobody has said which weights sampled it."""


class Status(str, Enum):
    """What became of the check of one completion.

    A status equals its value as text, and is written as such.
    """

    OK = "ok"
    """The answer is right."""
    WRONG = "wrong"
    """The answer is wrong."""
    UNPARSABLE = "unparsable"
    """No answer could be read from the completion."""
    TIMEOUT = "timeout"
    """The check took too long."""
    CRASHED = "crashed"
    """The check ended without a verdict."""
    OVERLONG = "overlong"
    """The completion was cut at the length limit."""
    EMPTY = "empty"
    """The completion has no token."""
    LOST = "lost"
    """No engine could finish the completion."""
    SCORE = "score"
    """A verifier gave a number, for a threshold to judge."""
    MISMATCH = "mismatch"
    """Trainer and engine log-probs differ beyond rollout.exclude_mismatch, right answer or not."""

    # As for text: a set of names finds members, and the other way round.
    __hash__ = str.__hash__

    def __str__(self) -> str:
        return self.value

    @property
    def failed(self) -> bool:
        """It says nothing of the answer: the check failed, or an engine lost the completion."""
        return self in (Status.TIMEOUT, Status.CRASHED, Status.LOST)

    @property
    def unchecked(self) -> bool:
        """The completion was not worth showing to a verifier."""
        return self in (Status.OVERLONG, Status.EMPTY)


class Label(IntEnum):
    """What a rollout counts as. Equal to its number, which is what tensors and files hold."""

    POSITIVE = 1
    """Verified correct."""
    NEGATIVE = 0
    """Verified wrong."""
    EXCLUDED = -1
    """Leaves its group: no loss, no weight, in no sum."""


POSITIVE = Label.POSITIVE
NEGATIVE = Label.NEGATIVE
EXCLUDED = Label.EXCLUDED


@dataclass(frozen=True)
class Prompt:
    """One question, rendered by the chat template and tokenised.

    Example:
        Prompt(
            uid="train/17",
            text="<|user|>2+3=<|assistant|>",
            token_ids=(5, 9, 12, 10, 7),
            answers=("5",),
        )
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
    """The row's data_source: names the benchmark."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The row's extra_info."""
    verifier: str = ""
    """The verifier of its training set where that is another than the run's."""


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
class Segment:
    """Consecutive tokens of a completion that are all trained, or all not."""

    start: int
    """Position of its first token in the completion."""
    end: int
    """One beyond the position of its last token."""
    trained: bool
    """Whether the policy sampled these tokens and is trained on them.

    It is False for a tool's output or a user's turn.
    """


@dataclass(frozen=True, init=False, eq=False)
class Completion:
    """What follows the prompt: tokens that the policy sampled, and perhaps others between them.

    The arrays are immutable. Only trained tokens have a log-prob, count in n_k and have a gradient;
    the others are context. An engine that returns one answer to one prompt trains every token.

    Example:
        Completion(
            [8, 2, 40, 41, 9],
            [-0.5, -1.0, 0.0, 0.0, -0.25],
            "...",
            True,
            trained=[1, 1, 0, 0, 1],
        )

    It has three segments, of which the middle one is a tool's output.
    """

    token_ids: TokenIds
    """[n] int32 tokens, with the end-of-sequence token when one was produced."""
    logprobs: Logprobs
    """[n] float32 the engine's own log-probs (nats) of the sampling distribution.

    They only measure the mismatch of trainer and engine, and mean nothing where a token is not
    trained.
    """
    text: str
    """Decoded response without special tokens."""
    finished: bool
    """True when it ended by an end-of-sequence token, False when it was cut at the limit."""
    trained: TokenMask
    """[n] bool, the tokens that the policy sampled and is trained on."""
    weight_version: NDArray[numpy.int32]
    """[n] int32 number of the step that began with the weights that sampled each token.

    It is UNKNOWN_VERSION where that is not known.
    """

    def __init__(
        self,
        token_ids: Sequence[int] | NDArray[Any],
        logprobs: Sequence[float] | NDArray[Any],
        text: str,
        finished: bool,
        trained: Sequence[bool] | TokenMask | None = None,
        weight_version: int | Sequence[int] | NDArray[Any] = UNKNOWN_VERSION,
    ) -> None:
        """Copies what is not an immutable array of its type already.

        Args:
            trained: None: every token.
            weight_version: a number counts for every token.

        Raises:
            ValueError: the arrays are not equally long.
        """
        tokens = _immutable(token_ids, numpy.int32)
        length = len(tokens)
        if trained is None:
            trained = numpy.ones(length, dtype=numpy.bool_)
        if isinstance(weight_version, int):
            weight_version = numpy.full(length, weight_version, dtype=numpy.int32)
        arrays = {
            "token_ids": tokens,
            "logprobs": _immutable(logprobs, numpy.float32),
            "trained": _immutable(trained, numpy.bool_),
            "weight_version": _immutable(weight_version, numpy.int32),
        }
        for name, array in arrays.items():
            if len(array) != length:
                raise ValueError(f"{length} token_ids but {len(array)} {name}")

        # Past the frozen dataclass, which refuses every assignment.
        vars(self).update(arrays, text=text, finished=finished)

    @property
    def num_tokens(self) -> int:
        """All of its tokens, trained or not."""
        return len(self.token_ids)

    @property
    def num_trained(self) -> int:
        """n_k, the trained tokens."""
        return int(self.trained.sum())

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Its tokens in order, cut where trained ones meet others."""
        # Positions at which a token is not of the kind of the one before it.
        cuts = (numpy.flatnonzero(self.trained[1:] != self.trained[:-1]) + 1).tolist()
        bounds = [0, *cuts]
        # Of no token there is no segment, rather than an empty one.
        if len(self.trained):
            bounds.append(len(self.trained))
        return tuple(
            Segment(start, end, bool(self.trained[start]))
            for start, end in itertools.pairwise(bounds)
        )

    def __eq__(self, other: object) -> bool:
        return _equal_fields(self, other)

    __hash__ = None  # type: ignore[assignment]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrays that were pickled are immutable again."""
        # numpy pickles an array without its flags.
        for value in state.values():
            if isinstance(value, numpy.ndarray):
                value.setflags(write=False)
        vars(self).update(state)


class Absent(Completion):
    """A completion whose tokens and text are in the memory of another rank (parallel/exchange.py).

    Its lengths are known here. Reading its arrays or its text is a mistake in the program, and
    raises AttributeError.
    """

    def __init__(
        self, *, num_tokens: int, num_trained: int, num_text_bytes: int, finished: bool
    ) -> None:
        """Knows these, and nothing else.

        Args:
            num_text_bytes: of its text in UTF-8.
        """
        # Not by Completion's own constructor, which asks for the arrays.
        vars(self).update(
            _num_tokens=num_tokens,
            _num_trained=num_trained,
            _num_text_bytes=num_text_bytes,
            finished=finished,
        )

    @property
    def num_tokens(self) -> int:
        """All of its tokens, trained or not."""
        return int(vars(self)["_num_tokens"])

    @property
    def num_trained(self) -> int:
        """n_k, the trained tokens."""
        return int(vars(self)["_num_trained"])

    @property
    def num_text_bytes(self) -> int:
        """Bytes of its text in UTF-8."""
        return int(vars(self)["_num_text_bytes"])

    def __getattr__(self, name: str) -> Any:
        # Python comes here only for what it has not found: the arrays and the text.
        raise AttributeError(f"{name} of an absent completion: another rank holds it")

    def __eq__(self, other: object) -> bool:
        return type(other) is Absent and vars(self) == vars(other)

    __hash__ = None

    def __repr__(self) -> str:
        return f"Absent({self.num_tokens} tokens)"

    @classmethod
    def of(cls, completion: Completion) -> Absent:
        """What is left of a completion where its tokens are not kept."""
        return cls(
            num_tokens=completion.num_tokens,
            num_trained=completion.num_trained,
            # A tokenizer may decode half of a surrogate pair, which plain UTF-8 refuses.
            num_text_bytes=len(completion.text.encode("utf-8", "surrogatepass")),
            finished=completion.finished,
        )


@dataclass(frozen=True)
class Verdict:
    """What a verifier said of one completion."""

    status: Status
    """What became of the check; the name of a status is taken too."""
    label: Label
    """What the rollout counts as; its number is taken too."""
    reward: float | None
    """1.0 or 0.0 from a binary verifier, its number from a scoring one; None where the check
    failed."""
    seconds: float = 0.0
    """Wall-clock time of the check; 0 where no verifier saw the completion."""
    reason: str = ""
    """Why there is no verdict, where the check failed or the completion was lost."""
    early: bool = False
    """Whether the check was over before the rank's engine had finished its last completion."""

    def __post_init__(self) -> None:
        """Raises ValueError for a status or a label that does not exist."""
        # The record is frozen: it refuses plain assignments.
        object.__setattr__(self, "status", Status(self.status))
        object.__setattr__(self, "label", Label(self.label))


# eq=False: a generated comparison would ask an array whether it is true.
@dataclass(frozen=True, eq=False)
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
    """Number of prompts that were drawn for this group before.

    They were given up because their rollouts were of one class.
    """
    reference_logprobs: Logprobs | None = None
    """[n] log-probs (nats) of the completion's tokens under the reference policy.

    They are 0 where a token is not trained; None where none were asked for. The dtype is float32,
    or float64 where the model computes in it.
    """
    holder: int | None = None
    """The rank that holds the completion; elsewhere it may be `Absent`. None: every rank has it."""

    def __post_init__(self) -> None:
        reference = self.reference_logprobs
        if reference is None:
            return
        # A model that computes in float64 is held against a reference, to its last digits.
        dtype: type[numpy.generic] = numpy.float32
        if getattr(reference, "dtype", None) == numpy.float64:
            dtype = numpy.float64
        object.__setattr__(self, "reference_logprobs", _immutable(reference, dtype))

    @property
    def label(self) -> Label:
        """What it counts as."""
        return self.verdict.label

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and all that follow it, trained or not."""
        return len(self.prompt.token_ids) + self.completion.num_tokens

    def __eq__(self, other: object) -> bool:
        return _equal_fields(self, other)

    __hash__ = None  # type: ignore[assignment]


def _immutable(values: Any, dtype: type[numpy.generic]) -> NDArray[Any]:
    """Returns the values as a read-only array [n]; a copy unless they are one already."""
    if isinstance(values, numpy.ndarray) and values.dtype == dtype and not values.flags.writeable:
        # Shared: the rollouts of a step are many, and each stage makes records anew of the same.
        array = values
    else:
        array = numpy.array(values, dtype=dtype)
        array.setflags(write=False)
    if array.ndim != 1:
        raise ValueError(f"tokens are one row of values, got the shape {list(array.shape)}")
    return array


def _equal_fields(record: Any, other: object) -> bool:
    """Whether two records of one type hold the same values, NaN being equal to itself."""
    names = [each.name for each in fields(record)]
    if type(record) is not type(other):
        # Python then asks the other one, and at last takes them for unequal.
        return NotImplemented

    for name in names:
        left = getattr(record, name)
        right = getattr(other, name)
        if isinstance(left, numpy.ndarray) and isinstance(right, numpy.ndarray):
            # numpy looks for NaN in numbers only, and refuses other arrays.
            nan = left.dtype.kind == "f"
            equal = left.dtype == right.dtype and numpy.array_equal(left, right, equal_nan=nan)
        else:
            # By type as well: to Python, 1 and True are equal.
            equal = left is right or (type(left) is type(right) and left == right)
        if not equal:
            return False
    return True
