"""Streaming video generation with hybrid attention, in JAX."""
