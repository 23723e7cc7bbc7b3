"""Passes of Megatron's pipeline schedules over packed micro-batches.

This is the one place that calls the schedules. Gradients are summed, never averaged: every
denominator is in the loss. Megatron averages in three places, and one switch,
calculate_per_token_loss=True with a loss of three values whose token count is 0, turns all of them
off (checked in megatron-core 0.16.1 and 0.19.2):

    pipeline_parallel/schedules.py forward_step_calc_loss: no division by the token count or the
        number of micro-batches, no multiplication by the context-parallel size;
    distributed/distributed_data_parallel.py: gradient_scaling_factor = 1, gradients are summed over
        DP and CP;
    distributed/finalize_model_grads.py: scales only `if num_tokens > 0`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from megatron_real.parallel.groups import ProcessGroups
from megatron_real.policy.microbatch import MicroBatch


@dataclass(frozen=True)
class Outputs:
    """What the last pipeline stage computes of one micro-batch."""

    logprob_T: Tensor
    """[T] log-prob of each position's target (nats), 0 without one; complete on every
    tensor-parallel rank."""
    entropy_T: Tensor | None
    """[T] entropy of each position's distribution (nats); None unless the model was built to
    compute it."""


Visit = Callable[[int, Outputs], None]
"""(index of the micro-batch in the pass, its outputs): keeps what a forward pass is made for."""
Loss = Callable[[int, Outputs], Tensor]
"""(index of the micro-batch in the pass, its outputs) -> scalar to be differentiated."""


class Passes:
    """Runs passes over the chunks of one rank's model. Holds no state between them.

    Example:
        passes.forward(micro_batches, lambda i, outputs: kept.append(outputs.logprob_T))
        passes.forward_backward(micro_batches, lambda i, outputs: -outputs.logprob_T.sum())
    """

    def __init__(self, chunks: Sequence[nn.Module], groups: ProcessGroups) -> None:
        """
        Args:
            chunks: this rank's model chunks, wrapped in Megatron's DDP where gradients are wanted.
            groups: its place in the layout.
        """
        self._chunks = list(chunks)
        self._groups = groups

    def forward(self, micro_batches: Sequence[MicroBatch], visit: Visit) -> None:
        """Computes every micro-batch without a gradient.

        `visit` is called on the last stage alone.
        """

        def visited(index: int, outputs: Outputs) -> Tensor:
            visit(index, outputs)
            # The schedule wants a loss even where nothing is differentiated.
            return outputs.logprob_T.sum()

        self._run(micro_batches, visited, forward_only=True)

    def logprobs(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Returns [micro-batches] of [T] log-probs under the present weights.

        The list is empty on all stages but the last.
        """
        logprobs: dict[int, Tensor] = {}

        def keep(index: int, outputs: Outputs) -> None:
            logprobs[index] = outputs.logprob_T.detach()

        self.forward(micro_batches, keep)
        return [logprobs[index] for index in sorted(logprobs)]

    def forward_backward(self, micro_batches: Sequence[MicroBatch], loss: Loss) -> None:
        """Adds a loss's gradient to the gradient buffers, and finishes their reduction.

        The loss is the sum of `loss` over all micro-batches and ranks.
        """
        self._run(micro_batches, loss, forward_only=False)

    def _run(self, micro_batches: Sequence[MicroBatch], loss: Loss, *, forward_only: bool) -> None:
        def forward_step(
            numbered: Iterator[tuple[int, MicroBatch]], model: nn.Module
        ) -> tuple[Tensor, Callable[[Tensor], Any]]:
            index, micro = next(numbered)
            output = model(micro.tokens_T, micro.target_T, micro.kept_K, micro.packed)
            return output, partial(loss_of_output, index)

        def loss_of_output(index: int, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            outputs = Outputs(output, None)
            if output.dim() == 2:
                outputs = Outputs(output[:, 0], output[:, 1])
            # A token count of 0 switches Megatron's averaging off: see the module's docstring.
            no_averaging = torch.zeros((), dtype=torch.int, device=output.device)
            return loss(index, outputs), no_averaging, {}

        num_tokens = [micro.tokens_T.numel() for micro in micro_batches]
        options: dict[str, Any] = {
            "data_iterator": enumerate(micro_batches),
            "model": self._chunks[0],
        }
        if len(self._chunks) > 1:
            # The interleaved schedule walks each chunk over all micro-batches by itself.
            options["data_iterator"] = [enumerate(micro_batches) for _ in self._chunks]
            options["model"] = self._chunks

        if self._groups.pp.size() > 1:
            config = get_model_config(self._chunks[0])
            options["p2p_communicator"] = PlannedShapes(self._groups, config, num_tokens)
            # megatron-core refuses a communicator of ours without the groups that go with it.
            options["pg_collection"] = self._groups.megatron

        # forward_only alone leaves autograd on: every micro-batch's activations would live as long
        # as its score.
        with torch.set_grad_enabled(not forward_only):
            get_forward_backward_func()(
                forward_step_func=forward_step,
                num_microbatches=len(micro_batches),
                # Wanted and ignored: under variable_seq_lengths shapes come from PlannedShapes.
                seq_length=num_tokens[0],
                micro_batch_size=1,
                forward_only=forward_only,
                **options,
            )


class PlannedShapes(P2PCommunicator):
    """Pipeline communication of one pass, whose tensors' shapes are known from the plan.

    Micro-batches differ in length, so megatron-core lets stages tell each other the shape before
    each tensor, reads it back and synchronises the device for it. But all stages of a data-parallel
    rank have planned the same micro-batches: what arrives next follows from the order in which the
    schedule takes them.
    """

    def __init__(self, groups: ProcessGroups, config: Any, num_tokens: Sequence[int]) -> None:
        """
        Args:
            groups: this rank's place in the layout.
            config: megatron-core's TransformerConfig.
            num_tokens: [micro-batches] tokens of each on this rank.
        """
        super().__init__(pp_group=groups.pp, config=config)
        ranks_of_sequence = groups.tp.size() if config.sequence_parallel else 1
        shapes = [[tokens // ranks_of_sequence, 1, config.hidden_size] for tokens in num_tokens]

        stages = groups.pp.size()
        stage = groups.pp.rank()
        num_chunks = config.virtual_pipeline_model_parallel_size or 1
        together = config.microbatch_group_size_per_vp_stage or stages
        # What the first stage's first chunk computes comes from no other stage, nor a gradient to
        # the last one's last.
        self._forward = self._in_order(shapes, together, num_chunks - (stage == 0))
        self._backward = self._in_order(shapes, together, num_chunks - (stage == stages - 1))

    @staticmethod
    def _in_order(
        shapes: Sequence[list[int]], together: int, num_chunks: int
    ) -> Iterator[list[int]]:
        """Yields the shapes in the order in which tensors arrive.

        The schedule takes `together` micro-batches at a time, chunk by chunk
        (pipeline_parallel/schedules.py, get_schedule_table; backward takes the chunks from the last
        to the first).
        """
        for start in range(0, len(shapes), together):
            for _ in range(num_chunks):
                yield from shapes[start : start + together]

    def _communicate_shapes(
        self, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        # Overrides megatron-core's exchange of shapes. Where nothing comes it wants a shape too.
        # Called once before each exchange, on every stage, in the order of the schedule.
        from_previous = [0, 0, 0]
        if recv_prev:
            from_previous = next(self._forward)

        from_next = [0, 0, 0]
        if recv_next:
            from_next = next(self._backward)
        return from_previous, from_next
