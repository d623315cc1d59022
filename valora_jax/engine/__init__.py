"""The engine: requests, KV pages, scheduling, and the steps that run them."""
