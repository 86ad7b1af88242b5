"""`python -m distill`."""

from .cli import main

main()
