"""HF <-> Megatron weights: one mapping for loading, weight sync and export."""
