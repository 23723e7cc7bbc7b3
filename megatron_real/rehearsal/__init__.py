"""`megatron-real rehearse`: one rank of a GPU cluster, run without a GPU and without its peers.

    guard.cpp     tells torch's CPU build that there is a device cuda:0, so that autograd has a
                  queue for it
    device.py     builds and loads guard.cpp, and answers what is asked of torch.cuda
    world.py      torch.distributed with NCCL's rules: every call is checked and counted, nothing
                  is sent
    meter.py      counts memory, FLOPs, kernels and device synchronisations; keeps values of small
                  tensors
    transformer_engine.py, te_kernels.py
                  TransformerEngine's own Python over kernels that have shapes alone
    rank.py       builds the policy on fake CUDA tensors and runs the parts of a step
    worker.py     the process that does it: a fork for each rank, so that libraries are imported
                  once
    report.py     what comes of it, as records and JSON
    launch.py     starts that process; commands/rehearse.py is the command line

The model, the optimizer, the schedules and the layout are the run's own code on real megatron-core.
What is replaced is the device (fake tensors have shapes and no memory), the network, and the
kernels of flash attention and of TransformerEngine.

A rehearsal needs g++ and torch's CPU build. Nothing computed here is a number of the training:
docs/rehearsal.md says what it is.
"""
