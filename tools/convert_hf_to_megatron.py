"""HF weights -> Megatron checkpoint: `python tools/convert_hf_to_megatron.py HF_DIR OUT`;
-h lists the options.

The same as `megatron-real convert to-megatron`, for those who look for a converter in tools/.
"""

import sys

from megatron_real.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "to-megatron", *sys.argv[1:]]))
