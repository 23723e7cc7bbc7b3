"""`megatron-real plan`: what a run will need and cost on a cluster.

It is computed from the configuration alone.

    memory.py    bytes of each pipeline stage's ranks in every part of a step
    devices.py   GPUs, and the published rates that times are computed from, each with its source
    speed.py     seconds of each stage of a step, GPU-hours and cost
    layouts.py   every layout that the model and the GPUs allow, ranked

No GPU, no weights and no torch: a model's config.json is enough.
"""
