"""`megatron-real serve`: a vLLM server for a run whose servers are elsewhere (rollout.servers).

    VLLM_API_KEY=... megatron-real serve CONFIG.yaml [--host ADDRESS] [--port N] [key.sub=value ...]

It takes the run's own configuration, so that engine and trainer fit, and becomes vLLM's server.
"""

from __future__ import annotations

import argparse
import importlib.util
import os

from megatron_real import config as configuration
from megatron_real.commands.arguments import add_overrides
from megatron_real.commands.terminal import input_checks
from megatron_real.conversion.convert import check_model

SUMMARY = "run a vLLM server for a run on other machines"
EXAMPLES = """\
example:
  VLLM_API_KEY=$(cat key) megatron-real serve my.yaml --host 10.0.0.7
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("config", help="the run's YAML file")
    add_overrides(parser)
    parser.add_argument("--host", help="address to listen on; default: rollout.server_host")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")


def run(options: argparse.Namespace) -> int:
    """Becomes the server, or returns 2 and says in one sentence why not."""
    key = os.environ.get("VLLM_API_KEY", "")
    with input_checks():
        config = configuration.load(options.config, options.overrides)
        if not key:
            raise ValueError(
                "VLLM_API_KEY is not set; give server and run the same secret, for example "
                "$(uuidgen)"
            )
        check_model(config.model.path, required=False)  # the weights come from the run
        if importlib.util.find_spec("vllm") is None:
            raise ValueError("vLLM is not installed; install vllm")

    from megatron_real.rollout.vllm_server.server import command, environment

    host = options.host or config.rollout.server_host
    words = command(config, host=host, port=options.port)
    # In this process's place, so that whoever started it holds the server itself. Without a
    # list of GPUs the server takes all that this process may see.
    os.execve(words[0], words, environment(config, key, gpus=[]))
