"""What ranks with TransformerEngine's layers are forked from: its Python first,
then all that other ranks have.
"""

from __future__ import annotations

import torch

from tests.emulated_te import install

torch.set_num_threads(1)
install.install()

import tests.distributed.preload  # noqa: E402, F401
