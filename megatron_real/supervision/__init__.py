"""Why a run ends before its last step, and how all its ranks end with it."""
