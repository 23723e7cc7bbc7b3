"""Trains language models by REAL (Rewards as Labels, arXiv:2602.05630) on Megatron-LM."""

__version__ = "0.1.0"
