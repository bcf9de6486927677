"""The chain of stages on a Slurm cluster."""
