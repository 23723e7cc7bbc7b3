"""The whole configuration of a run: typed dataclasses, checked at construction.

It loads without torch.

    config = load("examples/configs/quickstart.yaml", ["optimizer.lr=1e-4", "parallel.tp=2"])

    schema.py    the sections: every setting with its type, default, bounds and meaning
    load.py      YAML files and command-line words -> Config -> plain values
    checks.py    what several settings must satisfy together, with the number of processes and
                 with the model
    engines.py   what each rollout engine can do
    upstream.py  names of megatron-core and vLLM that pass through
    names.py     sentences about unknown names

A YAML file gives the values, `key.sub=value` words override them (OmegaConf: interpolation works),
and every error is one sentence that names the key, the value and the remedy. What needs the model's
own config.json (heads, layers) is checked here too, from the JSON file alone, so that a wrong
layout never waits for a GPU node.
"""

from megatron_real.config.checks import check_engine, check_model, check_world, too_few_sequences
from megatron_real.config.load import load, to_dict, to_plain
from megatron_real.config.schema import (
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    Given,
    LabelConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    SyncConfig,
    TrainerConfig,
)
from megatron_real.config.upstream import megatron_fields

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "Given",
    "LabelConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RolloutConfig",
    "SyncConfig",
    "TrainerConfig",
    "check_engine",
    "check_model",
    "check_world",
    "load",
    "megatron_fields",
    "to_dict",
    "to_plain",
    "too_few_sequences",
]
