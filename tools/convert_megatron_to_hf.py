"""Megatron checkpoint -> HF weights: `python tools/convert_megatron_to_hf.py CKPT OUT`;
-h lists the options.

The same as `megatron-real convert to-hf`, for those who look for a converter in tools/.
"""

import sys

from megatron_real.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "to-hf", *sys.argv[1:]]))
