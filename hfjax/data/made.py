"""Data that need nothing prepared: to try things out, and to test."""

import itertools
from typing import Any

import numpy as np
from jaxtyping import Float

from hfjax.data.rejects import DataError

_COLOURS = ("red", "green", "blue", "yellow")
_THINGS = ("square", "ball", "kite", "fish")
_WAYS = {"to the left": (0, -1), "to the right": (0, 1), "up": (-1, 0), "down": (1, 0)}


def made_prompts() -> list[str]:
  """Plain prompts, a few dozen, always the same."""
  return [
    f"a {colour} {thing} moves {way}"
    for colour, thing, way in itertools.product(_COLOURS, _THINGS, _WAYS)
  ]


class MadeClips:
  """Coloured squares that drift over grey, as bytes.

  shape: frames, rows, columns and colours of a clip, which depends on `seed` and its number alone.
  """

  def __init__(self, *shape: int, count: int, seed: int):
    if len(shape) != 4 or min(*shape, count) < 1:
      raise DataError(f"{count} clips of shape {shape} are asked for; give four sizes from 1 on.")
    self.shape, self.count, self.seed = shape, count, seed

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> dict[str, Any]:
    """{"prompt", "video"}; IndexError beyond the last."""
    if not 0 <= index < self.count:
      raise IndexError(index)
    frames, rows, columns, colours = self.shape
    rng = np.random.default_rng([self.seed, 2, index])
    way = [*_WAYS][rng.integers(len(_WAYS))]
    colour, begin = rng.integers(0, 256, colours), rng.integers(0, (rows, columns))
    clip = np.full(self.shape, 64, np.uint8)
    edge = max(1, min(rows, columns) // 3)
    for f in range(frames):
      y, x = (np.arange(edge) + b + f * w for b, w in zip(begin, _WAYS[way], strict=True))
      clip[f][np.ix_(y % rows, x % columns)] = colour
    return {"prompt": f"a square moves {way}", "video": clip}


class MadeLatents:
  """Blobs that drift over still noise; see `made_latents`."""

  def __init__(self, shape: tuple[int, int, int, int], count: int, seed: int):
    if min(*shape, count) < 1:
      raise DataError(f"{count} clips of shape {shape} are asked for; give sizes from 1 on.")
    self.shape, self.count, self.seed = shape, count, seed
    # What a colour is in latents: a direction in the space of channels, of unit variance.
    draws = np.random.default_rng([seed, 0]).standard_normal((len(_COLOURS), shape[-1]))
    norms = np.linalg.norm(draws, axis=1, keepdims=True)
    self._colours = draws / norms * np.sqrt(shape[-1])

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> dict[str, Any]:
    """{"prompt", "latents"}; IndexError beyond the last."""
    if not 0 <= index < self.count:
      raise IndexError(index)
    rng = np.random.default_rng([self.seed, 1, index])
    colour, way = rng.integers(len(_COLOURS)), [*_WAYS][rng.integers(len(_WAYS))]
    prompt = f"a {_COLOURS[colour]} blob moves {way}"
    return {"prompt": prompt, "latents": self._draw(rng, self._colours[colour], _WAYS[way])}

  def _draw(self, rng, colour, way) -> Float[np.ndarray, "f y x c"]:
    frames, rows, columns, channels = self.shape
    y, x = np.mgrid[:rows, :columns]
    begin = rng.uniform(0, (rows, columns))
    speed, radius = rng.uniform(0.5, 1.0), max(1.0, min(rows, columns) / 4)
    clip = np.empty(self.shape, np.float32)
    still = 0.1 * rng.standard_normal((rows, columns, channels))
    for f in range(frames):
      # Beyond an edge it comes back at the other.
      centre = begin + f * speed * np.asarray(way)
      dy = (y - centre[0] + rows / 2) % rows - rows / 2
      dx = (x - centre[1] + columns / 2) % columns - columns / 2
      blob = np.exp(-(dy**2 + dx**2) / (2 * radius**2))
      clip[f] = still + blob[..., None] * colour
    return clip


def made_latents(
  frames: int, rows: int, columns: int, channels: int, count: int = 64, seed: int = 0
) -> MadeLatents:
  """A source of clips `[f y x c]`, float32, whose captions say colour and direction.

  Each clip depends on `seed` and its number alone. Raises DataError on sizes below 1.
  """
  return MadeLatents((frames, rows, columns, channels), count, seed)
