"""The loop, its state, what it leaves on disk, and where batches come from."""
