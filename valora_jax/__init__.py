"""valora_jax: many LoRA adapters on one large multimodal model, served fast, on JAX."""
