"""Sizes of the working buffers of a run, for those who fill them and for a plan that counts them.

Loadable without torch.
"""

from __future__ import annotations

from collections.abc import Mapping

LOGITS_CHUNK_BYTES: Mapping[str, int] = {"cpu": 16 << 20, "cuda": 256 << 20}
"""Type of the device -> bytes of a chunk of logits in the log-prob head, in the dtype of its sums.

On a CPU it stays in the cache, and below the 32 MiB from which on glibc maps fresh pages for every
allocation (their faults cost more than the arithmetic). On a GPU it is what keeps the matrix
products and launches at full speed: 8192 tokens x 8192 vocabulary columns.
"""

SYNC_BUCKET_BYTES = 256 << 20
"""Bytes that a bucket of a weight sync to servers holds at most, unless a single tensor is larger.

Beside its model each side has one bucket, and the sender also the tensor that comes next.
"""
