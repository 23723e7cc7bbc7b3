"""`megatron-real` with a limit on the size of the files that it writes,
which stands in for a full disk.

python -m tests.integration.limited_job train ...
"""

from __future__ import annotations

import resource
import sys

from megatron_real import cli

LARGEST_FILE = 600 << 10
"""Bytes: less than a checkpoint's shard, more than all else that a short run of
the quickstart writes.
"""


if __name__ == "__main__":
    # A write beyond it fails with EFBIG: Python ignores the signal that would end the process.
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    sys.exit(cli.main(sys.argv[1:]))
