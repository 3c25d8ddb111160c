"""The embedded base: a small Stable Diffusion in diffusers' layout, and the scripts that rebuild it."""
