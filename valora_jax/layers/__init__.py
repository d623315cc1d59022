"""Blocks that model families share. `linear.py` is the one place where a LoRA branch is added."""
