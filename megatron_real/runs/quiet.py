"""Which warnings of other libraries a run shows: none that its reader can do nothing about.

Loadable without torch.
"""

from __future__ import annotations

import warnings


def quiet_libraries() -> None:
    """Hides deprecations, and warnings of torch and megatron-core that mean no fault."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    # By module: a UserWarning of a user's own verifier is shown.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|megatron)\b.*")
    # This one is tqdm's, in a notebook without ipywidgets.
    warnings.filterwarnings("ignore", message="IProgress not found")
