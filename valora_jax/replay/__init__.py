"""Replays of request traces: what arrives when, a simulated device, and what users would see."""
