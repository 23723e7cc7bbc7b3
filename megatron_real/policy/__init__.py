"""The policy on Megatron: model, log-probs and the exact train step. The only code that knows Megatron's schedules."""
