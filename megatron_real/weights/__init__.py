"""HF <-> Megatron weights: one mapping for conversion, loading, weight sync and export."""


class WeightsError(ValueError):
    """Weights that cannot be used, in one sentence: what, the value, the remedy."""
