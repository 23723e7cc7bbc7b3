"""HF directory <-> Megatron checkpoint by moving bytes; checks and descriptions of both."""
