"""Rotary embedding over frames, rows and columns, and the sinusoids of timesteps.

Angles reach a thousand radians and more, where float32 products lose what cosines need. So whole
positions are looked up in tables made in float64, digit by digit, and joined by the addition
theorem; only a fraction below one is multiplied in float32.

Pairs of channels (j, j + d/2) form complex numbers. Published weights pair neighbours (2j, 2j+1);
`convert` permutes the rows of their query and key projections, which changes no score.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

THETA = 10000.0
_RADIX = 128
# Digits needed by any non-negative int32 position.
_DIGITS = 5


class Rotation(NamedTuple):
  """Cosines and sines of rotary angles, float32, one per token and channel pair."""

  cos: Float[Array, "b s p"]
  sin: Float[Array, "b s p"]


def split_pairs(pairs: int) -> tuple[int, int, int]:
  """Channel pairs that encode frame, row and column: rows and columns a third each, floored."""
  third = pairs // 3
  return pairs - 2 * third, third, third


def frequencies(pairs: int) -> np.ndarray:
  """Angular frequencies `10000^(-i / pairs)`, float64."""
  return THETA ** (-np.arange(pairs) / max(pairs, 1))


def turn(position: Int[Array, "..."], omega: np.ndarray, limit: int | None = None) -> Rotation:
  """Cosine and sine of `position * omega`, accurate to float32 for any int32 position >= 0.

  limit: bound that positions stay below, if known; fewer table look-ups are made then.
  """
  digits = _DIGITS if limit is None else next(n for n in range(1, 6) if _RADIX**n >= limit)

  def look_up(n: int) -> Rotation:
    angles = np.arange(_RADIX)[:, None] * (_RADIX**n * omega)[None]
    digit = (position // _RADIX**n) % _RADIX
    return Rotation(*(jnp.asarray(f(angles), jnp.float32)[digit] for f in (np.cos, np.sin)))

  return functools.reduce(_add_angles, map(look_up, range(digits)))


def _add_angles(a: Rotation, b: Rotation) -> Rotation:
  return Rotation(a.cos * b.cos - a.sin * b.sin, a.sin * b.cos + a.cos * b.sin)


def timestep_embedding(t: Float[Array, "..."], width: int) -> Float[Array, "... w"]:
  """Sinusoids of timesteps >= 0, cosines first (spec section 2); float32.

  Raises ValueError if `width` is odd.
  """
  if width % 2:
    raise ValueError(
      f"The timestep embedding is {width} wide; it holds cosines and sines, so make the width even."
    )
  omega = frequencies(width // 2)
  t = jnp.asarray(t, jnp.float32)
  whole = jnp.floor(t)
  angle = (t - whole)[..., None] * jnp.asarray(omega, jnp.float32)
  base = turn(whole.astype(jnp.int32), omega)
  return jnp.concatenate(_add_angles(base, Rotation(jnp.cos(angle), jnp.sin(angle))), axis=-1)


def grid_rotation(
  frames: Int[Array, "b f"],
  grid: tuple[int, int],
  head_dim: int,
  limit: int | None = None,
  still: Array | None = None,
) -> Rotation:
  """Rotation of every token of the given frames.

  frames: rotary position of each frame, non-negative.
  grid: token rows and columns.
  limit: bound that frame positions stay below, if known.
  still: bool `[b f]`, frames whose tokens are not to be rotated at all.

  Raises ValueError if `head_dim` is odd.
  """
  check_head_dim(head_dim)
  rows, columns = grid
  widths = split_pairs(head_dim // 2)
  axes = (
    (frames[:, :, None, None], limit),
    (jnp.arange(rows)[None, None, :, None], rows),
    (jnp.arange(columns)[None, None, None, :], columns),
  )
  b, f = frames.shape
  parts = []
  for (position, bound), width in zip(axes, widths, strict=True):
    part = turn(position, frequencies(width), bound)
    shape = (b, f, rows, columns, width)
    parts.append(Rotation(*(jnp.broadcast_to(x, shape) for x in part)))
  cos, sin = (jnp.concatenate(x, axis=-1) for x in zip(*parts, strict=True))
  if still is not None:
    rest = still[:, :, None, None, None]
    cos, sin = jnp.where(rest, 1.0, cos), jnp.where(rest, 0.0, sin)
  return Rotation(*(x.reshape(b, f * rows * columns, head_dim // 2) for x in (cos, sin)))


def rotate(x: Float[Array, "b s h d"], rotation: Rotation) -> Float[Array, "b s h d"]:
  """Rotates channel pairs (j, j + d/2); computed in float32, in the dtype of `x`."""
  cos, sin = (r[:, :, None, :] for r in rotation)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def check_head_dim(head_dim: int):
  """Raises ValueError unless channels pair up."""
  if head_dim < 2 or head_dim % 2:
    raise ValueError(
      f"The head dimension is {head_dim}; rotary embedding turns pairs of channels, "
      "so make it a positive even number."
    )
