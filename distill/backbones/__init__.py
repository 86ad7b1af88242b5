"""One file per family of networks: how to open, encode, call, decode and save it."""
