"""`megatron-real doctor`: what a run will use here, what falls back, and what would break it, each with its remedy.

finding.py   one line of the report, and the same lines of many nodes as one
software.py  packages: which are used, which fall back, which would break
machine.py   GPUs, memory, limits, and the file system of the run directory
network.py   what only the ranks together can tell: clocks, the shared directory, an all-reduce
command.py   the report and the command line
"""

from megatron_real.doctor.command import report
from megatron_real.doctor.finding import Finding

__all__ = ["Finding", "report"]
