"""Figures of pictures that any field knows: FID, KID, CLIP score, diversity, seconds a picture."""
