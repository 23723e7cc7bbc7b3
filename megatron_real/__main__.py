"""`python -m megatron_real` is `megatron-real`."""

import sys

from megatron_real.cli import main

if __name__ == "__main__":
    sys.exit(main())
