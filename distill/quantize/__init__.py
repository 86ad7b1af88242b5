"""Four bits: quantize, pack, load and run."""
