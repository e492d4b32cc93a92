"""What `python -m hfjax.sample` is made of."""
