"""The loader: plans an epoch of windows, reads exactly what the plan names, hands out batches."""
