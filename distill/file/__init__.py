"""The file contract: one safetensors file is the whole model."""
