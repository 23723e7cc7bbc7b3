"""`megatron-real serve`: a vLLM server for a run whose servers are elsewhere (rollout.servers).

    VLLM_API_KEY=... megatron-real serve CONFIG.yaml [--host ADDRESS] [--port 8000] [key.sub=value ...]

It takes the run's own configuration, so that engine and trainer fit, and becomes vLLM's server.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from typing import Any

from megatron_real import config as configuration


def add_command(commands: Any) -> None:
    """Adds `serve` to the command line's parsers."""
    parser = commands.add_parser("serve", help="serve rollouts", description="Runs a vLLM server for a training run.")
    parser.add_argument("config", help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replaces a value of the file")
    parser.add_argument("--host", help="address to listen on; default: rollout.server_host")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")


def run(chosen: argparse.Namespace) -> int:
    """Becomes the server, or returns 2 and says in one sentence why not."""
    key = os.environ.get("VLLM_API_KEY", "")
    try:
        config = configuration.load(chosen.config, chosen.overrides)
        if not key:
            raise ValueError("VLLM_API_KEY is not set; give server and run the same secret, for example $(uuidgen)")
        if importlib.util.find_spec("vllm") is None:
            raise ValueError("vLLM is not installed; install vllm")
    except ValueError as error:
        print(f"megatron-real: {error}", file=sys.stderr)
        return 2
    from megatron_real.rollout.server import command, environment

    words = command(config, host=chosen.host or config.rollout.server_host, port=chosen.port)
    os.execve(words[0], words, environment(key, gpus=[]))
