"""llmtrain: one readable training loop for large language models, under plain torchrun and Slurm."""

__version__ = "0.1.0"
