"""Dataset rows -> prompts, in a seeded order that can be resumed."""

from megatron_real.prompts.cursor import PromptCursor
from megatron_real.prompts.dataset import load_prompts
from megatron_real.prompts.rows import Row, read_rows

__all__ = ["PromptCursor", "Row", "load_prompts", "read_rows"]
