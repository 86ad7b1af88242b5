"""One file per method: its options, a student loss and, where it has one, a coach loss. No optimiser inside."""
