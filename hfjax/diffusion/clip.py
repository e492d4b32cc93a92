"""Whole clips of undistilled models, every frame seeing every other (spec section 7.4)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hfjax.diffusion import guidance as guiding
from hfjax.diffusion.solvers import MultistepSolver
from hfjax.models import checks, wan
from hfjax.models.presets import WanConfig


def sample_clip(
  config: WanConfig,
  params: wan.Params,
  context: Float[Array, "b t w"],
  noise: Float[Array, "b f y x c"],
  solver: MultistepSolver,
  guidance: float = 1.0,
  negative: Float[Array, "b t w"] | None = None,
  dtype=jnp.float32,
  interval: guiding.Interval = guiding.ALWAYS,
  progress: Callable[[int], None] | None = None,
) -> Float[Array, "b f y x c"]:
  """Clean latents of a clip, float32, from standard normal noise.

  guidance: scale of classifier-free guidance; 1 for none, else a negative text is needed, one for
    each sample or `[1 t w]` for all. Another scale, prompt or seed compiles nothing anew.
  dtype: compute dtype of the network; latents stay float32.
  interval: times from and up to which there is guidance.
  progress: called after each step, when it is done, with the number of steps done.

  Raises ValueError on sizes that do not fit the model.
  """
  if not isinstance(solver, MultistepSolver):
    raise ValueError(f"The solver is a {type(solver).__name__}; give a MultistepSolver.")
  if config.in_dim != config.out_dim or config.image_dim:
    raise ValueError(
      f"The model takes {config.in_dim} channels and image embeddings of width "
      f"{config.image_dim}, and gives {config.out_dim} channels; clips are sampled of "
      "text-to-video models."
    )
  interval = guiding.as_interval(interval)
  wan.check_params(config, params)
  wan.check_latents(config, noise)
  text = guiding.join_texts(config, jnp.asarray(context), negative, guidance)
  checks.check_batch("text context", context, noise.shape[0])
  # Copies: buffers are donated from step to step, and the noise is the caller's.
  state = jax.tree.map(jnp.copy, solver.init(noise))
  for i in range(solver.steps):
    state = _step(
      config, solver, jnp.dtype(dtype), interval, params, state, text, float(guidance), i
    )
    if progress is not None:
      jax.block_until_ready(state.x)
      progress(i + 1)
  return state.x


@functools.partial(
  jax.jit, static_argnames=("config", "solver", "dtype", "interval"), donate_argnames="state"
)
def _step(config, solver, dtype, interval, params, state, text, guidance, i):
  texts = text.shape[0] // state.x.shape[0]
  t = jnp.full(text.shape[:1], jnp.asarray(solver.timesteps, jnp.float32)[i])
  x = guiding.repeat_rows(state.x, texts)
  flow = wan.predict_flow(config, params, x, t, text, dtype=dtype)
  scale = guiding.scale_at(guidance, interval, t[: state.x.shape[0]])
  return solver.step(state, guiding.merge_rows(flow, texts, scale), i)
