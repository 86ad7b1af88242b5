"""Quantized weights as a loader needs them: what they are, the layers that hold them, the kernels that compute."""
