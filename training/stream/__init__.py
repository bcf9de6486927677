"""The loader: a plan of each epoch's windows, exact ranged reads, and batches without copies."""
