"""The engines that generate in the processes of the trainer, and the protocol of every engine."""
