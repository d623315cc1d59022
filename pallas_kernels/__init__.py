"""Kernels of valora_jax; each folder is one operation with the same file names. Usable without the rest."""
