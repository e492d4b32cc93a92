"""Checks of sizes and inputs, each with a sentence; all work on shapes, also while tracing."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def make_integers(config: Any, *names: str):
  """Makes fields of a frozen dataclass Python integers; ValueError if one is no whole number."""
  for name in names:
    value = getattr(config, name)
    try:
      if isinstance(value, bool):
        raise TypeError
      object.__setattr__(config, name, operator.index(value))
    except TypeError as e:
      raise ValueError(f"{name} is {value!r}; it must be a whole number.") from e


def make_patch(config: Any):
  """Makes the field `patch` a pair of positive integers; ValueError if it is none."""
  patch = config.patch
  ok = isinstance(patch, Sequence) and len(patch) == 2
  if not ok or any(isinstance(p, bool) or not isinstance(p, int) or p < 1 for p in patch):
    raise ValueError(
      f"The patch is {patch!r}; give positive numbers of rows and columns, as (2, 2)."
    )
  object.__setattr__(config, "patch", tuple(patch))


def check_number(name: str, value: Any, low: float, high: float):
  """Raises ValueError unless `value` is a number from `low` to `high`."""
  if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
    raise ValueError(f"{name} is {value!r}; it must be a number from {low:g} to {high:g}.")


def check_row(name: str, row: Any, kind: Any):
  """Raises ValueError unless `row` is a tuple of finite numbers of a type, or of several."""
  if not isinstance(row, tuple) or not all(isinstance(x, kind) and math.isfinite(x) for x in row):
    raise ValueError(f"{name} is {row!r}; give a tuple of finite numbers of its kind.")


def check_grid(height: int, width: int, patch: tuple[int, int]):
  """Raises ValueError unless the patch divides the latent rows and columns."""
  for name, size, step in (("rows", height, patch[0]), ("columns", width, patch[1])):
    if size < 1 or size % step:
      raise ValueError(
        f"The latent has {size} {name}, which the patch of {step} does not divide; use a positive "
        f"multiple of {step} (in pixels, of {8 * step} with the Wan VAE)."
      )


def as_times(t: Any, batch: int, frames: int) -> Array:
  """Times as an array `[b]` or `[b f]`; ValueError if their shape is another one."""
  t = jnp.asarray(t)
  if t.shape not in ((batch,), (batch, frames)):
    raise ValueError(
      f"The times have shape {t.shape}; give one for each of {batch} samples, {(batch,)}, or one "
      f"for each of their {frames} frames, {(batch, frames)}."
    )
  return t


def check_batch(name: str, array: Any, batch: int):
  """Raises ValueError unless the first axis of `array` is the batch."""
  if array.shape[0] != batch:
    raise ValueError(
      f"The {name} is for {array.shape[0]} samples and the latents are for {batch}; give as many."
    )


def check_params(params: Any, shapes: dict[str, tuple[int, ...]]):
  """Raises ValueError unless `params` are nested arrays of these shapes, by path."""
  leaves = jax.tree_util.tree_flatten_with_path(params)[0]
  have = {"/".join(str(getattr(k, "key", k)) for k in path): x for path, x in leaves}
  wrong = [f"{n} is missing" for n in shapes if n not in have]
  wrong += [f"{n} is not of this model" for n in have if n not in shapes]
  wrong += [
    f"{n} has shape {list(have[n].shape)} instead of {list(shape)}"
    for n, shape in shapes.items()
    if n in have and have[n].shape != shape
  ]
  wrong += [
    f"{n} is {x.dtype}" for n, x in have.items() if not jnp.issubdtype(x.dtype, jnp.floating)
  ]
  if wrong:
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    raise ValueError(
      f"The parameters are not those of this configuration: {'; '.join(wrong[:3])}{more}. Use the "
      "configuration they were made with."
    )
