"""The policy on Megatron: model, log-probs and the exact train step.

This is the only code that knows Megatron's schedules.
"""
