"""LoRA adapters: their files, the host store, the device pool and the batch that picks them."""
