"""vLLM's worker in a server, and what the trainer asks of it by remote call (vLLM's /collective_rpc).

Arguments are JSON text and answers are plain values, because the server accepts nothing else. What can be asked is the
list in server_door.py. Each worker answers for the part of the model that it holds.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from vllm.platforms import current_platform

from megatron_real.rollout.checksum import checksum
from megatron_real.rollout.link import Link, Slot, link_secret, unpacked
from megatron_real.rollout.vllm_engine import pack, plain_weights
from megatron_real.rollout.vllm_weights import parts_of

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
        """How the engine was started, and where each tensor lies: [shape, [[start, stop] of each axis]] by name."""
        parts = parts_of(self.get_model())
        return {
            "logprobs_mode": self.model_config.logprobs_mode,
            "max_model_len": self.model_config.max_model_len,
            "held": {
                name: [
                    part.shape,
                    [s.indices(n)[:2] for s, n in zip(part.part, part.shape, strict=True)],
                ]
                for name, part in parts.items()
            },
        }

    def link_name(self) -> list[str]:
        """The link it has joined, if any: a worker that was started again has none."""
        return [self._link_name]

    def join_link(self, text: str) -> None:
        """Joins the trainer's link."""
        said = json.loads(text)
        self._link = Link.join(
            tuple(said["address"]),
            link_secret(os.environ["VLLM_API_KEY"], said["name"]),
            rank=self.rank + 1,
            size=said["size"],
            device=self.device,
            seconds=said["seconds"],
        )
        self._link_name = said["name"]

    def receive_bucket(self, text: str) -> None:
        """Loads one bucket as it comes over the link."""
        said = json.loads(text)
        assert self._link is not None, "the trainer lets a worker join before it sends"
        slots = [
            Slot(name, dtype, tuple(shape), start) for name, dtype, shape, start in said["slots"]
        ]
        self.get_model().load_weights(unpacked(self._link.receive(said["num_bytes"]), slots))

    def pack_weights(self) -> None:
        """After the last bucket: what vLLM computes with, made anew of what was loaded."""
        pack(self.get_model())

    def checksums(self, text: str) -> dict[str, int]:
        """The checksum of what it holds of each tensor, in the dtype that is given for it."""
        parts = parts_of(self.get_model())
        return {
            name: checksum(parts[name].tensor.to(getattr(torch, t)))
            for name, t in json.loads(text).items()
        }
