"""Variants of a configuration, trained with several seeds and compared.

    megatron-real compare SWEEP.yaml

    SWEEP.yaml        --sweep.py-->                   runs
    runs              --execute.py-->                 run directories
    run directories   --results.py-->                 results
    results           --statistics.py, table.py-->    rows of a table

Each run is an ordinary `megatron-real train` in a directory of its own. Everything that the table
says is read from these directories, so it is the same however often the sweep was interrupted. The
package loads without torch.
"""
