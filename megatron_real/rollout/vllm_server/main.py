"""Becomes vLLM's own server, with some arguments from the environment.

A command line can be read by every user of its machine; the environment cannot.

    MEGATRON_REAL_SERVER_ARGUMENTS='["--hf-token", "..."]' \\
        python -m megatron_real.rollout.vllm_server.main --port 8000 ...
"""

from __future__ import annotations

import json
import os
import runpy
import sys

VARIABLE = "MEGATRON_REAL_SERVER_ARGUMENTS"
"""A JSON list of words that belong to the command line."""

SERVER = "vllm.entrypoints.openai.api_server"


def main() -> None:
    """Runs vLLM's server with the words of the command line and those of the environment."""
    # Removed from the environment, so that no process that the server starts inherits them.
    sys.argv += json.loads(os.environ.pop(VARIABLE, "[]"))
    runpy.run_module(SERVER, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
