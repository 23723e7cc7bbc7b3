"""`megatron-real doctor`: what a run will use here, what falls back, and what would break it.

Each finding comes with its remedy.

finding.py      one line of the report, and the same lines of many nodes as one
software.py     packages: which are used, which fall back, which would break
machine.py      GPUs, memory, limits, and the file system of the run directory
containment.py  how far verifiers that run text are held in
network.py      what only the ranks together can tell: clocks, the shared directory, an all-reduce
report.py       all findings, of all ranks
"""

from megatron_real.doctor.finding import Finding
from megatron_real.doctor.report import report

__all__ = ["Finding", "report"]
