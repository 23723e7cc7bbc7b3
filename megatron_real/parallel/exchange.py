"""Rollouts travel between ranks: their facts to all, their tokens to those that train on them.

    share     every rank learns of each rollout its place, lengths, status, label and reward: 56
              bytes
    bring     tokens go from the rank that holds them to the ranks that want them, once, in one
              all-to-all
    returned  values of single tokens go back to the rank that holds the rollout

A rollout is held by the rank that sampled it. On every other rank its completion is `Absent`:
lengths without arrays. Everything is a flat tensor in host memory, over a gloo group, whatever the
devices; nothing is pickled. A rank sends and receives its own share of the tokens; what grows with
all rollouts is the table of facts alone.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_real.records import Absent, Completion, Label, Prompt, Rollout, Status, Verdict

# A status travels as its place in here, which is the same on all ranks: they run one version.
_STATUSES = tuple(Status)

_FACTS = numpy.dtype(
    [
        ("reward", "<f8"),
        ("seconds", "<f8"),
        ("group", "<i4"),
        ("sample", "<i4"),
        ("holder", "<i4"),
        ("num_tokens", "<i4"),
        ("num_trained", "<i4"),
        ("text_bytes", "<i4"),
        ("reason_bytes", "<i4"),
        ("status", "<i4"),
        ("label", "<i4"),
        ("has_reward", "?"),
        ("finished", "?"),
        ("early", "?"),
        # Fills the row up to whole words.
        ("unused", "?"),
    ]
)
"""What every rank knows of every rollout.

Its size is a multiple of 4 bytes, because rows are summed as int32 words.
"""


class Exchange:
    """All ranks of a job, as far as rollouts travel between them.

    The methods that send anything are collective: all but `keep_own` and `held_by_node`.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        group: dist.ProcessGroup | None = None,
        *,
        ranks_per_node: int = 0,
    ) -> None:
        """Takes the place of this rank among the others.

        Args:
            rank, world: this rank, and how many there are.
            group: a gloo group of all ranks, in their order; None for the default group.
            ranks_per_node: successive ranks that share a node, the same number on each; 0: all
                share one.
        """
        self.rank = rank
        self.world = world
        self.group = group
        # Without a word on nodes all ranks are taken to share one disk, as on a workstation.
        self.ranks_per_node = ranks_per_node or world

    @property
    def node(self) -> int:
        """Returns the node of this rank, counted from 0."""
        return self.rank // self.ranks_per_node

    @property
    def num_nodes(self) -> int:
        """Returns the number of nodes of the job."""
        return self.world // self.ranks_per_node

    @property
    def first_of_node(self) -> bool:
        """Returns whether this is the rank that reads and writes rollouts for its node."""
        return self.rank % self.ranks_per_node == 0

    def share(
        self, own: Sequence[Rollout], prompts: Sequence[Prompt] | Mapping[int, Prompt]
    ) -> list[Rollout]:
        """Makes every rank's rollouts known on every rank.

        Args:
            own: those that this rank holds, whole; no two ranks have the same place.
            prompts: by the group of a rollout, the same on every rank.

        Returns:
            All rollouts in order of group and sample: those of this rank as they were given, the
            others with absent completions.
        """
        # How many each rank has: the sum of arrays that are 0 but for one's own place is a gather.
        counts_W = torch.zeros(self.world, dtype=torch.int64)
        counts_W[self.rank] = len(own)
        self._sum(counts_W)
        first = int(counts_W[: self.rank].sum())

        # Each rank fills in its own rows alone, so the sum of all ranks' tables has every row as it
        # was written.
        table_R = numpy.zeros(int(counts_W.sum()), dtype=_FACTS)
        for row, rollout in enumerate(own, first):
            table_R[row] = self._facts(rollout)
        self._sum(torch.from_numpy(table_R.view(numpy.int32)))
        reasons = self._reasons(own, first, table_R)

        rollouts = []
        for row, facts in enumerate(table_R):
            if first <= row < first + len(own):
                rollouts.append(dataclasses.replace(own[row - first], holder=self.rank))
            else:
                rollouts.append(_rollout_of(facts, prompts[facts["group"]], reasons[row]))
        return sorted(rollouts, key=lambda r: (r.group, r.sample))

    def keep_own(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Deals out rollouts that every rank has whole: each is held by one rank from now on.

        Nothing is sent.
        """
        dealt = []
        for i, rollout in enumerate(rollouts):
            holder = i % self.world
            completion = rollout.completion
            reference = rollout.reference_logprobs
            if holder != self.rank:
                completion = Absent.of(completion)
                reference = None

            dealt.append(
                dataclasses.replace(
                    rollout, completion=completion, reference_logprobs=reference, holder=holder
                )
            )
        return dealt

    def bring(
        self,
        rollouts: Sequence[Rollout],
        wanted: Sequence[Sequence[int]],
        *,
        text: bool = False,
    ) -> list[Rollout]:
        """Brings the tokens of rollouts to the ranks that want them.

        Args:
            rollouts: the same on every rank but for what is absent.
            wanted: [ranks] the positions in `rollouts` that each rank wants, the same on every
                rank.
            text: whether the completions' text travels too; if not, the text of a completion that
                was absent is empty.

        Returns:
            The rollouts, of which those that this rank wants are whole.
        """
        # Without a holder every rank has every token, as when saved rollouts are replayed.
        if self.world == 1 or all(rollout.holder is None for rollout in rollouts):
            return list(rollouts)

        # Bytes of a reference log-prob, 0 where there are none: only those that hold rollouts know
        # it, and all ranks must count alike.
        own_bytes = 0
        for rollout in rollouts:
            if rollout.holder == self.rank and rollout.reference_logprobs is not None:
                own_bytes = max(own_bytes, rollout.reference_logprobs.itemsize)
        reference_bytes = max(self.of_ranks(own_bytes))

        # What goes out: for each rank, in its order, what it wants of what this rank holds.
        outgoing: list[list[NDArray[Any]]] = []
        for destination, positions in enumerate(wanted):
            parts = []
            for position in positions:
                if destination != self.rank and rollouts[position].holder == self.rank:
                    parts += _arrays(rollouts[position], reference_bytes, text=text)
            outgoing.append(parts)

        # What comes in: from each holder, in the order in which this rank wants it.
        incoming: dict[int, list[int]] = defaultdict(list)
        for position in wanted[self.rank]:
            holder = rollouts[position].holder
            if holder is not None and holder != self.rank:
                incoming[holder].append(position)
        sizes = [
            sum(_num_bytes(rollouts[i], reference_bytes, text=text) for i in incoming[source])
            for source in range(self.world)
        ]

        received = self._all_to_all(outgoing, sizes)

        brought = list(rollouts)
        first = 0
        for source in range(self.world):
            for position in incoming[source]:
                rollout = rollouts[position]
                end = first + _num_bytes(rollout, reference_bytes, text=text)
                brought[position] = _whole(rollout, received[first:end], reference_bytes)
                first = end

        return brought

    def to_first(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Returns the rollouts, of which the first rank has all whole, with their text."""
        everything = range(len(rollouts))
        return self.bring(rollouts, [everything] + [()] * (self.world - 1), text=True)

    def to_nodes(
        self, rollouts: Sequence[Rollout], positions: Sequence[int] | None = None
    ) -> list[Rollout]:
        """Brings the rollouts that the ranks of a node hold to the node's first rank.

        They arrive whole and with their text. On one node that is `to_first`. On several no rank
        gets more than its node's share, and no tokens leave a node.

        Args:
            rollouts: the same on every rank but for what is absent.
            positions: those in `rollouts` that are wanted; None: all.

        Returns:
            The rollouts; on the first rank of a node, those wanted that its node holds are whole.
        """
        if positions is None:
            positions = range(len(rollouts))
        wanted: list[list[int]] = [[] for _ in range(self.world)]
        for position in positions:
            first_of_node = self._node_of(rollouts[position]) * self.ranks_per_node
            wanted[first_of_node].append(position)
        return self.bring(rollouts, wanted, text=True)

    def held_by_node(self, rollouts: Sequence[Rollout]) -> list[int]:
        """Returns the positions of the rollouts that ranks of this node hold.

        Those that every rank has count as the first node's.
        """
        return [i for i, rollout in enumerate(rollouts) if self._node_of(rollout) == self.node]

    def _node_of(self, rollout: Rollout) -> int:
        if rollout.holder is None:
            return 0
        return rollout.holder // self.ranks_per_node

    def returned(
        self,
        rollouts: Sequence[Rollout],
        values: Mapping[int, NDArray[Any]],
        computed_by: Mapping[int, int],
        dtype: type[numpy.floating[Any]],
    ) -> dict[int, NDArray[Any]]:
        """Sends values of single tokens to the ranks that hold the rollouts.

        Args:
            rollouts: the same on every rank but for what is absent.
            values: by position in `rollouts`, a value for each of its tokens; those that this rank
                has computed.
            computed_by: the rank that has computed each position.
            dtype: of the values.

        Returns:
            By position, the values of the rollouts that this rank holds.
        """
        # The wire has the values' own precision: a reference log-prob in float64 stays exact.
        own = numpy.dtype(dtype)
        outgoing: list[list[NDArray[Any]]] = [[] for _ in range(self.world)]
        incoming: dict[int, list[int]] = defaultdict(list)

        # Both ends go through the positions in the same order, so the bytes need no labels.
        for position, source in sorted(computed_by.items()):
            holder = rollouts[position].holder
            holders: Iterable[int] = range(self.world)
            if holder is not None:
                holders = [holder]
            for destination in holders:
                if source == self.rank:
                    outgoing[destination].append(values[position].astype(own))
                if destination == self.rank:
                    incoming[source].append(position)

        lengths = {i: rollouts[i].completion.num_tokens * own.itemsize for i in computed_by}
        sizes = [sum(lengths[i] for i in incoming[source]) for source in range(self.world)]
        received = self._all_to_all(outgoing, sizes)

        received_by_position = {}
        first = 0
        for source in range(self.world):
            for position in incoming[source]:
                end = first + lengths[position]
                received_by_position[position] = numpy.frombuffer(
                    received[first:end].tobytes(), dtype=own
                )
                first = end
        return received_by_position

    def of_ranks(self, value: int) -> list[int]:
        """Returns [ranks] a number of each rank, on every rank."""
        values_W = torch.zeros(self.world, dtype=torch.int64)
        values_W[self.rank] = value
        self._sum(values_W)
        return [int(value) for value in values_W]

    def all_agree(self, agrees: bool) -> bool:
        """Returns whether `agrees` is true on every rank."""
        return sum(self.of_ranks(int(agrees))) == self.world

    def _facts(self, rollout: Rollout) -> tuple[Any, ...]:
        completion = rollout.completion
        verdict = rollout.verdict
        reward = verdict.reward
        if reward is None:
            reward = 0.0  # `has_reward` says that there is none

        # In the order of _FACTS' fields.
        return (
            reward,
            verdict.seconds,
            rollout.group,
            rollout.sample,
            self.rank,
            completion.num_tokens,
            completion.num_trained,
            len(_utf8(completion.text)),
            len(_utf8(verdict.reason)),
            _STATUSES.index(verdict.status),
            int(verdict.label),
            verdict.reward is not None,
            completion.finished,
            verdict.early,
            False,
        )

    def _reasons(
        self, own: Sequence[Rollout], first: int, table_R: NDArray[numpy.void]
    ) -> list[str]:
        """Returns [R] why there is no verdict, "" where there is one.

        Few rollouts have a reason, and in most steps none has: then nothing is sent.
        """
        # Every rank knows all lengths, and so the place of each reason in one long text.
        ends_R = numpy.cumsum(table_R["reason_bytes"], dtype=numpy.int64)
        starts_R = ends_R - table_R["reason_bytes"]
        total = int(table_R["reason_bytes"].sum())
        if total == 0:
            return [""] * len(table_R)

        letters = numpy.zeros(total, dtype=numpy.uint8)
        for row, rollout in enumerate(own, first):
            reason = _utf8(rollout.verdict.reason)
            letters[starts_R[row] : ends_R[row]] = numpy.frombuffer(reason, dtype=numpy.uint8)
        # Each byte is written by one rank and 0 on all others, so that the sum cannot overflow.
        self._sum(torch.from_numpy(letters))

        return [
            _text(letters[start:end].tobytes()) for start, end in zip(starts_R, ends_R, strict=True)
        ]

    def _sum(self, tensor: torch.Tensor) -> None:
        """Sums a tensor over the ranks, in place."""
        if self.world > 1 and tensor.numel():
            dist.all_reduce(tensor, group=self.group)

    def _all_to_all(
        self, outgoing: Sequence[Sequence[NDArray[Any]]], sizes: Sequence[int]
    ) -> NDArray[numpy.uint8]:
        """Sends each rank its arrays, as bytes.

        Args:
            outgoing: [ranks] of arrays, this rank's own among them.
            sizes: [ranks] bytes that come from each.

        Returns:
            What has come, in order of ranks.
        """
        # The empty array is for a rank that sends nothing: numpy concatenates no empty list.
        nothing = numpy.zeros(0, dtype=numpy.uint8)
        parts = [
            numpy.ascontiguousarray(array).view(numpy.uint8)
            for arrays in outgoing
            for array in arrays
        ]
        sent = numpy.concatenate([nothing, *parts])

        if self.world == 1:
            return sent

        received = torch.empty(sum(sizes), dtype=torch.uint8)
        dist.all_to_all_single(
            received,
            torch.from_numpy(sent),
            list(sizes),
            [sum(array.nbytes for array in arrays) for arrays in outgoing],
            group=self.group,
        )
        return received.numpy()


def _rollout_of(facts: numpy.void, prompt: Prompt, reason: str) -> Rollout:
    completion = Absent(
        num_tokens=int(facts["num_tokens"]),
        num_trained=int(facts["num_trained"]),
        num_text_bytes=int(facts["text_bytes"]),
        finished=bool(facts["finished"]),
    )

    reward = None
    if facts["has_reward"]:
        reward = float(facts["reward"])

    verdict = Verdict(
        _STATUSES[facts["status"]],
        Label(int(facts["label"])),
        reward,
        float(facts["seconds"]),
        reason,
        bool(facts["early"]),
    )

    return Rollout(
        prompt,
        int(facts["group"]),
        int(facts["sample"]),
        completion,
        verdict,
        holder=int(facts["holder"]),
    )


def _arrays(rollout: Rollout, reference_bytes: int, *, text: bool) -> list[NDArray[Any]]:
    """Returns what travels of a rollout, in the order in which `_whole` reads it."""
    completion = rollout.completion
    arrays: list[NDArray[Any]] = [
        completion.token_ids,
        completion.logprobs,
        completion.weight_version,
        completion.trained,
    ]

    if reference_bytes:
        reference = rollout.reference_logprobs
        # Zeros in its place: all rollouts take the same bytes a token, as the receiver counts.
        if reference is None:
            reference = numpy.zeros(completion.num_tokens, dtype=numpy.float32)
        arrays.append(reference.astype(f"<f{reference_bytes}"))

    if text:
        arrays.append(numpy.frombuffer(_utf8(completion.text), dtype=numpy.uint8))
    return arrays


def _num_bytes(rollout: Rollout, reference_bytes: int, *, text: bool) -> int:
    """Returns the bytes of what `_arrays` sends of a rollout."""
    completion = rollout.completion
    # Token id, log-prob and weight version take 4 bytes each, the mask 1.
    size = completion.num_tokens * (4 + 4 + 4 + 1 + reference_bytes)
    if text:
        assert isinstance(completion, Absent), "only what is absent is brought"
        size += completion.num_text_bytes
    return size


def _whole(rollout: Rollout, data: NDArray[numpy.uint8], reference_bytes: int) -> Rollout:
    """Returns the rollout with what `_arrays` has sent of it; the rest of the bytes is its text."""
    length = rollout.completion.num_tokens
    first = 0

    def next_array(dtype: str) -> NDArray[Any]:
        nonlocal first
        end = first + length * numpy.dtype(dtype).itemsize
        # A copy: at its place in the buffer the array need not be aligned.
        array = numpy.frombuffer(data[first:end].tobytes(), dtype=dtype)
        first = end
        return array

    # In the order of `_arrays`.
    token_ids = next_array("<i4")
    logprobs = next_array("<f4")
    versions = next_array("<i4")
    trained = next_array("?")
    reference = None
    if reference_bytes:
        reference = next_array(f"<f{reference_bytes}")

    completion = Completion(
        token_ids,
        logprobs,
        _text(data[first:].tobytes()),
        rollout.completion.finished,
        trained,
        versions,
    )
    return dataclasses.replace(rollout, completion=completion, reference_logprobs=reference)


def _utf8(text: str) -> bytes:
    """Returns a text as bytes, the exact ones for any text.

    A model may emit half a surrogate pair, which strict UTF-8 refuses.
    """
    return text.encode("utf-8", "surrogatepass")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")
