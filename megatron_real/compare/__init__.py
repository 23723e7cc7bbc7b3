"""Variants of a configuration, trained with several seeds and compared: `megatron-real compare SWEEP.yaml`.

    SWEEP.yaml --sweep.py--> runs --execute.py--> run directories --results.py--> results --table.py--> rows of a table
                                                                                              ^
                                                                           statistics.py -----+

Each run is an ordinary `megatron-real train` in a directory of its own. Everything that the table says is read from these
directories, so that it is the same however often the sweep was interrupted. Loadable without torch.
"""
