"""vLLM's worker in a server, with the methods that the trainer calls by /collective_rpc.

Arguments are JSON text and answers are plain values, because the server accepts nothing else.
door.py lists the methods that can be called. Each worker answers for the part of the model
that it holds.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from vllm.platforms import current_platform

from megatron_real.rollout.checksum import checksum
from megatron_real.rollout.engines.vllm import pack, plain_weights
from megatron_real.rollout.engines.vllm_weights import parts_of
from megatron_real.rollout.vllm_server.link import BucketSlot, Link, link_secret, unpacked

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as VllmWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as VllmWorker


class Worker(VllmWorker):
    """A worker that takes its weights from the trainer."""

    _link: Link | None = None
    _link_name = ""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Builds the model so that its weights can be loaded into and read back."""
        with plain_weights():
            super().load_model(*args, **kwargs)

    def describe(self) -> dict[str, Any]:
        """Says how the engine was started, and which part of each tensor this worker holds.

        Returns:
            `logprobs_mode` and `max_model_len`, and under `held`, by name, [shape, [[start, stop]
            of each axis]].
        """
        held = {}
        for name, part in parts_of(self.get_model()).items():
            # slice(None) becomes numbers: JSON knows no slices.
            axes = zip(part.part, part.shape, strict=True)
            held[name] = [part.shape, [axis.indices(size)[:2] for axis, size in axes]]
        return {
            "logprobs_mode": self.model_config.logprobs_mode,
            "max_model_len": self.model_config.max_model_len,
            "held": held,
        }

    def link_name(self) -> list[str]:
        """Returns the name of the link that it has joined.

        A worker that was started again has joined none; the name is then empty.
        """
        return [self._link_name]

    def join_link(self, text: str) -> None:
        """Joins the trainer's link.

        Args:
            text: an object with `name`, `address`, `size` and `seconds`.
        """
        invitation = json.loads(text)
        self._link = Link.join(
            tuple(invitation["address"]),
            # The server's key, in whose environment its workers run.
            link_secret(os.environ["VLLM_API_KEY"], invitation["name"]),
            rank=self.rank + 1,  # the sender is rank 0
            size=invitation["size"],
            device=self.device,
            seconds=invitation["seconds"],
        )
        self._link_name = invitation["name"]

    def receive_bucket(self, text: str) -> None:
        """Waits for one bucket and loads its tensors into the model.

        Args:
            text: an object with `num_bytes` and `slots`, a list of the fields of each `BucketSlot`.
        """
        contents = json.loads(text)
        assert self._link is not None, "the trainer lets a worker join before it sends"
        slots = [
            BucketSlot(name, dtype, tuple(shape), start)
            for name, dtype, shape, start in contents["slots"]
        ]
        # vLLM copies from these views, which the next bucket overwrites.
        flat = self._link.receive(contents["num_bytes"])
        self.get_model().load_weights(unpacked(flat, slots))

    def pack_weights(self) -> None:
        """Makes what vLLM computes with from what was loaded; called after the last bucket."""
        pack(self.get_model())

    def checksums(self, text: str) -> dict[str, int]:
        """Returns the checksum of what this worker holds of each tensor.

        Args:
            text: an object of the tensors' names, each with the dtype that the checksum is of.
        """
        parts = parts_of(self.get_model())
        sums = {}
        for name, dtype in json.loads(text).items():
            sums[name] = checksum(parts[name].tensor.to(getattr(torch, dtype)))
        return sums
