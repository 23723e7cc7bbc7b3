"""Everything heavy that a rank of a test needs, imported once:
ranks are forked from a process that has it.
"""

from __future__ import annotations

import gc
import warnings

import pytest  # noqa: F401  # each rank imports the file of its test
import torch

from megatron_real.parallel import cpu

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
cpu.enable()

import megatron.core.dist_checkpointing  # noqa: E402, F401
import omegaconf  # noqa: E402, F401
import pandas  # noqa: E402, F401  # pyarrow asks for it with the first table
import transformers.models.llama.modeling_llama  # noqa: E402
import transformers.models.qwen2.modeling_qwen2  # noqa: E402
import transformers.models.qwen3.modeling_qwen3  # noqa: E402
import transformers.tokenization_utils_sentencepiece  # noqa: E402, F401

import megatron_real.checkpoint.state  # noqa: E402
import megatron_real.job  # noqa: E402, F401

# A collection in a fork would look at every imported object, and by that copy the pages of all of
# them: a third of a second each time.
gc.collect()
gc.freeze()
