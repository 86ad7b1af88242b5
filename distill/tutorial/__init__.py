"""Trains the bundled tutorial models, one file each: `python -m distill.tutorial.build` makes everything in assets/."""
