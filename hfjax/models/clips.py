"""Clips in pieces: what both autoencoders share in cutting clips and in refusing wrong ones."""

from collections.abc import Callable, Mapping
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

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


def to_uint8(x: Float[Array | np.ndarray, "... 3"]) -> UInt8[Array | np.ndarray, "... 3"]:
  """Pixels in [-1, 1] as bytes: to the nearest, clamped, NaN black.

  NumPy arrays give NumPy arrays. Others are worked on by JAX, also within `jax.jit`, so that only
  bytes leave the device. The published code truncates instead, which darkens by half a level.
  Raises ValueError unless `x` is floating point with 3 channels at the end.
  """
  if not x.ndim or x.shape[-1] != 3 or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      f"Pixels have shape {tuple(x.shape)} and dtype {x.dtype}; give floating point numbers in "
      "[-1, 1] with 3 channels at the end."
    )
  xp = np if isinstance(x, np.ndarray) else jnp
  levels = xp.nan_to_num(127.5 * x.astype(np.float32) + 127.5, nan=0)
  return xp.round(xp.clip(levels, 0, 255)).astype(np.uint8)


def check_latents(z: Array, channels: int):
  """Raises ValueError unless `z` is `[b f y x z]`, real, not empty, with that many channels."""
  _check_clip("Latents have", z, channels)


def check_pixels(x: Array, factor: int):
  """Raises ValueError unless `x` is real `[b t y x 3]`, not empty, its sides multiples of `factor`.

  Bytes are refused: the autoencoders do not agree on the range that stands for 0 to 255.
  """
  _check_clip("The video has", x, PIXEL_CHANNELS)
  rows, columns = x.shape[2:4]
  if rows % factor or columns % factor:
    raise ValueError(
      f"Frames are {rows} x {columns} pixels; the autoencoder takes multiples of {factor}. Crop "
      f"them to {rows // factor * factor} x {columns // factor * factor}, or resize them."
    )


def _check_clip(what: str, x: Array, channels: int):
  if x.ndim != 5 or x.shape[-1] != channels or not x.size:
    raise ValueError(
      f"{what} shape {tuple(x.shape)}; the autoencoder takes [batch, frames, rows, columns, "
      f"channels] with {channels} channels, at least one frame and no empty axis."
    )
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      f"{what} dtype {x.dtype}; give floating point numbers in the range of the autoencoder."
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


def check_cache(cache: Any, name: str, x: Array, stride: int = 1):
  """Raises ValueError unless a cache fits the piece `x`, which has `stride` times its sides.

  name: the entry of the cache that is compared.
  """
  if not isinstance(cache, Mapping) or name not in cache:
    what = f"a dictionary without {name}" if isinstance(cache, Mapping) else f"{cache!r}"
    raise ValueError(
      f"The cache is {what}; "
      "give what the call before returned, or begin with the call for the first frame."
    )
  past = cache[name]
  held = (past.shape[0], stride * past.shape[2], stride * past.shape[3])
  if held != (x.shape[0], *x.shape[2:4]):
    raise ValueError(
      f"The cache is of a batch of {held[0]} with frames of {held[1]} x {held[2]}, and the piece "
      f"of {x.shape[0]} with {x.shape[2]} x {x.shape[3]}; go on with the stream that the cache "
      "belongs to, or start another."
    )
