"""Losses of all stages, as pure functions of what networks predict (spec section 8).

Images are clean latents `[b f y x c]`, computed in float32 whatever they come in. A mask, of their
shape or one that broadcasts to it, says what counts; all does by default. Nothing here calls a
network, and what no gradient shall flow through is stopped here.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hfjax.diffusion.schedule import TRAIN_TIMESTEPS

# Times at which scores are compared, of 1000: nearer to the ends they say little.
LOWEST, HIGHEST = 20.0, 980.0


def score_times(
  raw: Array, shift: float, lowest: float = LOWEST, highest: float = HIGHEST
) -> Float[Array, "..."]:
  """Timesteps of raw ones, from 0 to 999: shifted by `1000 s u / (1 + (s - 1) u)`, u = raw / 1000,
  and kept between `lowest` and `highest`; float32.
  """
  u = jnp.asarray(raw, jnp.float32) / TRAIN_TIMESTEPS
  t = TRAIN_TIMESTEPS * (shift * u / (1 + (shift - 1) * u)) if shift > 1 else TRAIN_TIMESTEPS * u
  return jnp.clip(t, lowest, highest)


def extrapolate(conditional: Array, unconditional: Array, scale: Array | float) -> Array:
  """Guidance as score distillation has it: `conditional + scale (conditional - unconditional)`.

  Its scale of 3 is one of 4 in the usual form, `guidance.guide`.
  """
  return conditional + scale * (conditional - unconditional)


def score_difference(
  image: Float[Array, "b f y x c"], fake: Float[Array, "b f y x c"], real: Float[Array, "b f y x c"]
) -> Float[Array, "b f y x c"]:
  """Direction in which the image is less likely: `(fake - real) / mean |image - real|`.

  fake, real: clean images that the critic and the teacher see in the noised image. The mean is over
  each sample. Where the quotient is no number it is 0, and where it is infinite the largest number.
  No gradient flows.
  """
  image, fake, real = (jax.lax.stop_gradient(_f32(x)) for x in (image, fake, real))
  size = jnp.abs(image - real).mean(axis=tuple(range(1, image.ndim)), keepdims=True)
  return jnp.nan_to_num((fake - real) / size)


def matching_loss(
  image: Float[Array, "b f y x c"],
  direction: Float[Array, "b f y x c"],
  mask: Bool[Array, "..."] | None = None,
) -> Float[Array, ""]:
  """Distribution matching: `1/2 mean (image - sg(image - direction))^2`.

  Its value says little; its gradient by the image is `direction` over the number of what counts.
  """
  image = _f32(image)
  target = jax.lax.stop_gradient(image - direction)
  return 0.5 * masked_mean((image - target) ** 2, mask)


def denoising_loss(
  flow: Float[Array, "b f y x c"],
  image: Float[Array, "b f y x c"],
  noise: Float[Array, "b f y x c"],
  weight: Float[Array, "..."] | None = None,
  mask: Bool[Array, "..."] | None = None,
) -> Float[Array, ""]:
  """Flow matching, of critics and of undistilled models: `mean w (flow - (noise - image))^2`.

  weight: of each sample `[b]` or frame `[b f]`, such as `FlowSchedule.training_weight`.
  """
  target = jax.lax.stop_gradient(_f32(noise) - _f32(image))
  error = (_f32(flow) - target) ** 2
  if weight is not None:
    error *= weight.reshape(*weight.shape, *(1,) * (error.ndim - weight.ndim))
  return masked_mean(error, mask)


def regression_loss(
  predicted: Float[Array, "b f y x c"],
  target: Float[Array, "b f y x c"],
  mask: Bool[Array, "..."] | None = None,
) -> Float[Array, ""]:
  """`mean (predicted - sg(target))^2`: of reflow, whose target is where the teacher's trajectory
  from the same noise ends, and of regression on trajectories, whose mask leaves out clean frames.
  """
  return masked_mean((_f32(predicted) - jax.lax.stop_gradient(_f32(target))) ** 2, mask)


def masked_mean(x: Float[Array, "..."], mask: Bool[Array, "..."] | None) -> Float[Array, ""]:
  """Mean of what counts; 0 if nothing does."""
  if mask is None:
    return x.mean()
  mask = jnp.broadcast_to(mask, x.shape)
  return jnp.where(mask, x, 0).sum() / jnp.maximum(mask.sum(), 1)


def _f32(x: Array) -> Array:
  return jnp.asarray(x).astype(jnp.float32)
