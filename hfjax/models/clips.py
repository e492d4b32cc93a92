"""Clips in pieces: what both autoencoders share in cutting clips and in refusing wrong ones."""

from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

PIXEL_CHANNELS = 3


def with_past(
  x: Float[Array, "b t y x c"], past: Array | None, frames: int
) -> Float[Array, "b u y x c"]:
  """Frames with the `frames` before them in front; zeros where there is no past."""
  if past is None:
    past = jnp.zeros((x.shape[0], frames, *x.shape[2:]), x.dtype)
  return jnp.concatenate([past, x], axis=1)


def scan_pieces(
  step: Callable,
  first: Float[Array, "b t y x c"],
  cache,
  rest: Float[Array, "b u y x c"],
  size: int,
) -> Float[Array, "b v y x c"]:
  """`first`, and what `step(cache, piece) -> (y, cache)` makes of the rest.

  size: frames of a piece; only one piece is worked on at a time, which saves memory.
  """
  if not rest.shape[1]:
    return first

  def body(cache, piece):
    y, cache = step(cache, piece)
    return cache, y

  pieces = einops.rearrange(rest, "b (n t) y x c -> n b t y x c", t=size)
  _, more = jax.lax.scan(body, cache, pieces)
  return jnp.concatenate([first, einops.rearrange(more, "n b t y x c -> b (n t) y x c")], axis=1)


def check_latents(z: Array, channels: int):
  """Raises ValueError unless `z` is `[b f y x z]`, not empty, with that many channels."""
  if z.ndim != 5 or z.shape[-1] != channels or not z.shape[1]:
    raise ValueError(
      f"Latents have shape {tuple(z.shape)}; the autoencoder takes [batch, frames, rows, "
      f"columns, channels] with at least one frame and {channels} channels."
    )


def check_pixels(x: Array, factor: int):
  """Raises ValueError unless `x` is `[b t y x 3]`, not empty, its sides multiples of `factor`."""
  if x.ndim != 5 or x.shape[-1] != PIXEL_CHANNELS or not x.shape[1]:
    raise ValueError(
      f"The video has shape {tuple(x.shape)}; the autoencoder takes [batch, frames, rows, "
      f"columns, channels] with at least one frame and {PIXEL_CHANNELS} channels."
    )
  rows, columns = x.shape[2:4]
  if rows % factor or columns % factor:
    raise ValueError(
      f"Frames are {rows} x {columns} pixels; the autoencoder takes multiples of {factor}. Crop "
      f"them to {rows // factor * factor} x {columns // factor * factor}, or resize them."
    )


def check_first(x: Array):
  """Raises ValueError unless `x` is one frame."""
  if x.shape[1] != 1:
    raise ValueError(
      f"The first call of a stream got {x.shape[1]} frames; give it one, and the rest to the "
      "calls for chunks."
    )


def check_piece(x: Array, factor: int):
  """Raises ValueError unless `x` has a multiple of `factor` frames."""
  if x.shape[1] % factor:
    raise ValueError(
      f"The piece has {x.shape[1]} frames; after the first frame, give multiples of {factor}."
    )


def check_cache(past: Float[Array, "b t y x c"], x: Array, stride: int = 1):
  """Raises ValueError unless a cache fits the piece `x`, which has `stride` times its sides."""
  held = (past.shape[0], stride * past.shape[2], stride * past.shape[3])
  if held != (x.shape[0], *x.shape[2:4]):
    raise ValueError(
      f"The cache is of a batch of {held[0]} with frames of {held[1]} x {held[2]}, and the piece "
      f"of {x.shape[0]} with {x.shape[2]} x {x.shape[3]}; go on with the stream that the cache "
      "belongs to, or start another."
    )
