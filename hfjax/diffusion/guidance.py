"""Classifier-free guidance (spec section 7.3): flow under a prompt, led away from a negative one.

Both flows come from one forward of twice the batch: rows under the prompts, and behind them as
many rows under the negative prompts.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from hfjax.diffusion.schedule import TRAIN_TIMESTEPS
from hfjax.models import checks, wan
from hfjax.models.presets import WanConfig

Interval = tuple[float, float]
ALWAYS: Interval = (0.0, float(TRAIN_TIMESTEPS))
_SAME = 0.01  # schedules give times a little off, such as 599.99994


def guide(conditional: Array, unconditional: Array, scale: Array | float) -> Array:
  """Guided flow: `unconditional + scale (conditional - unconditional)`."""
  return unconditional + scale * (conditional - unconditional)


def scale_at(scale: Array | float, interval: Interval, t: Float[Array, "b ..."]) -> Array | float:
  """Scale of guidance of flows `[b f y x c]` at times `t`, `[b]` or `[b f]`.

  interval: times from and up to which there is guidance; elsewhere the scale is 1. Guidance in a
    limited interval: arXiv 2404.07724.
  """
  if interval == ALWAYS:
    return scale
  low, high = interval[0] - _SAME, interval[1] + _SAME
  return jnp.where((t >= low) & (t <= high), scale, 1.0).reshape(*t.shape, *[1] * (5 - t.ndim))


def as_interval(interval: Interval) -> Interval:
  """Two times as floats; ValueError unless they are two from 0 to 1000, the lower one first."""
  try:
    low, high = interval
  except (TypeError, ValueError):
    raise ValueError(
      f"The interval of guidance is {interval!r}; give two times, such as (500, 1000)."
    ) from None
  for time in (low, high):
    checks.check_number("A time of the interval of guidance", time, 0, TRAIN_TIMESTEPS)
  if low > high:
    raise ValueError(f"Guidance is to be from time {low:g} up to {high:g}; give the lower first.")
  return float(low), float(high)


def count_texts(guidance: float) -> int:
  """Texts of each sample: 2 with guidance, and 1 at guidance 1, which is none.

  Raises ValueError unless `guidance` is a number from 0 to 100.
  """
  checks.check_number("The guidance", guidance, 0, 100)
  return 1 if guidance == 1 else 2


def repeat_rows(x: Float[Array, "b ..."], texts: int) -> Float[Array, "..."]:
  """The batch once for each text, all samples under the first text in front."""
  return x if texts == 1 else jnp.concatenate([x] * texts)


def merge_rows(
  flow: Float[Array, "..."], texts: int, scale: Array | float
) -> Float[Array, "b ..."]:
  """Flow of each sample, of the flows of its texts."""
  if texts == 1:
    return flow
  conditional, unconditional = jnp.split(flow, texts)
  return guide(conditional, unconditional, scale)


def join_texts(
  config: WanConfig,
  context: Float[Array, "b t w"],
  negative: Float[Array, "b t w"] | None,
  guidance: float,
) -> Float[Array, "..."]:
  """Text of all rows, of full length: `context`, and with guidance `negative` behind it.

  negative: one for each sample, or `[1 t w]` for all; of any number of rows.

  Raises ValueError on text of another model or batch, and if there is a negative text without
  guidance or none with it.
  """
  texts = count_texts(guidance)
  context = wan.pad_text(config, context)
  if (negative is None) != (texts == 1):
    raise ValueError(
      f"Guidance {guidance:g} needs a negative text; give one, such as an encoded empty prompt."
      if negative is None
      else "A negative text was given, which guidance 1 does not use; leave it out, or set another "
      "guidance."
    )
  if negative is None:
    return context
  negative = wan.pad_text(config, negative)
  if negative.shape[0] not in (1, context.shape[0]):
    raise ValueError(
      f"The negative text is for {negative.shape[0]} samples and the text for "
      f"{context.shape[0]}; give as many, or one for all."
    )
  return jnp.concatenate([context, jnp.broadcast_to(negative, context.shape)])
