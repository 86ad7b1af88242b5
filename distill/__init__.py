"""OneStep's library: distil a diffusion model into a one-step student with a coach. Imports nothing until you do."""
