"""Holding in what runs text of a completion, with the means of the Linux kernel.

docs/sandbox.md says how and how far.

kernel.py      the kernel's calls that Python lacks
calls.py       which system calls are left, as seccomp filters
walls.py       the steps: namespaces and a root of one's own, Landlock, filters, limits
supervisor.py  the process outside, with which everything in there ends
rung.py        how much of it this node allows
"""

from megatron_real.labels.sandbox.rung import REMEDY, Rung, this_node

__all__ = ["REMEDY", "Rung", "this_node"]
