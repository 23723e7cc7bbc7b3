"""Which warnings of other libraries are shown during a run: none that its reader can do nothing about.

Loadable without torch.
"""

from __future__ import annotations

import warnings


def quiet_libraries() -> None:
    """Hides deprecations, and what torch and megatron-core warn of while they work as intended."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|megatron)\b.*")
    # tqdm, in a notebook without ipywidgets.
    warnings.filterwarnings("ignore", message="IProgress not found")
