"""Rollouts: self-forcing, a student's own stream, the last chunks of which carry gradients; and
streams along given clips.

Spec sections 8.4 and 8.5. How many chunks there are and at which denoising step they are taken are
traced numbers, so that one compilation serves all of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hfjax.diffusion import schedule
from hfjax.models import wan
from hfjax.streaming.config import StreamConfig
from hfjax.streaming.state import begin_chunk, init_state
from hfjax.streaming.step import ChunkNoise, commit, denoise


class Student(Protocol):
  """What is rolled out. States and chunks are its own; `params` may carry gradients."""

  timesteps: tuple[float, ...]
  sigmas: tuple[float, ...]  # of the timesteps, and 0

  def init(self, params: Any) -> Any:
    """The state of a stream that has not begun."""
    ...

  def begin(self, state: Any) -> Any:
    """The next chunk."""
    ...

  def flow(self, params: Any, chunk: Any, x: Array, t: Array, final: bool) -> Array:
    """Flow of the chunk's latents at times `[b]`. final: of the step that may carry a gradient."""
    ...

  def commit(self, params: Any, chunk: Any, x0: Array) -> Any:
    """The state after the chunk."""
    ...


class StreamStudent:
  """A streaming transformer under prompts; a `Student`."""

  def __init__(self, config: StreamConfig, context: Float[Array, "b t w"]):
    """context: encoded prompts. Raises ValueError on a configuration with guidance or a solver."""
    if config.texts != 1 or config.solver is not None:
      raise ValueError(
        "A student takes few steps without guidance; leave solver and guidance out of its "
        "configuration."
      )
    self.config, self.context = config, context
    self.timesteps, self.sigmas = config.timesteps, config.sigmas

  def init(self, params: wan.Params):
    c = self.config
    return init_state(c, wan.text_keys(c.model, params, self.context, c.compute_dtype))

  def begin(self, state):
    return begin_chunk(self.config, state)

  def flow(self, params, chunk, x, t, final):
    # Keys of the text are computed anew where they shall carry a gradient (quirk 16).
    return denoise(self.config, params, chunk, x, t, self.context if final else None)

  def commit(self, params, chunk, x0):
    return commit(self.config, params, chunk, x0)


class Rollout(NamedTuple):
  """What a rollout gives; k chunks carry gradients, of c frames each, of m at most.

  latents: of those chunks. first: what their first denoising step predicts; None unless asked for.
  all: clean latents of all chunks, without gradients, the valid ones in front.
  """

  latents: Float[Array, "b kc y x z"]
  first: Float[Array, "b kc y x z"] | None
  all: Float[Array, "b mc y x z"]


def roll_out(
  student: Student,
  params: Any,
  noise: Callable[[Int[Array, ""]], ChunkNoise],
  exit_step: Int[Array, ""] | int,
  chunks: Int[Array, ""] | int,
  *,
  most: int,
  last: int = 7,
  first: bool = False,
  renoise_first: bool = True,
  context: Callable[[Array, Int[Array, ""]], Array] | None = None,
) -> Rollout:
  """Streams so many chunks, each taken at denoising step `exit_step` and then committed.

  Gradients flow through one forward of each of the last chunks, that of the exit step, and through
  that of the first step if it is asked for. What came before is a constant.

  noise: of a chunk, by its number. exit_step: from 0 to the last step. chunks: from `last` to
    `most` (static), of which the `last` ones carry gradients.
  first: whether predictions of the first step are wanted. Where the exit step is the first they are
    the latents.
  renoise_first: False leaves the noise as it is after the first step, as published (quirk 5).
  context: makes of clean latents and a chunk's number what is committed; them by default.

  Raises ValueError unless there are 1 to `most` last chunks.
  """
  if not 1 <= last <= most:
    raise ValueError(f"Gradients of {last} of {most} chunks were asked for; ask for 1 to {most}.")
  times = jnp.asarray(student.timesteps, jnp.float32)
  sigmas = jnp.asarray(student.sigmas, jnp.float32)
  frozen = jax.lax.stop_gradient(params)
  exit_step = jnp.asarray(exit_step, jnp.int32)

  def predict(params, chunk, x, i, final):
    t = jnp.full(x.shape[:1], times[i])
    return schedule.remove_flow(x, student.flow(params, chunk, x, t, final), sigmas[i])

  def noised(chunk, drawn, start):
    """What enters the exit step, if that is not the first. start: what the first predicts."""

    def noise_again(x, x0, i):
      again = schedule.mix_noise(x0, drawn.again[i], sigmas[i + 1])
      return again if renoise_first else jnp.where(i == 0, x, again)

    def one(i, x):
      return noise_again(x, predict(frozen, chunk, x, i, False), i)

    if start is None:
      return jax.lax.fori_loop(0, exit_step, one, drawn.start)
    after = noise_again(drawn.start, jax.lax.stop_gradient(start), 0)
    return jax.lax.fori_loop(1, exit_step, one, after)

  def one_chunk(params, state, number, final):
    """The state after a chunk, its latents, and what its first step predicts."""
    chunk, drawn = student.begin(state), noise(number)
    start = None
    if final and first:
      start = predict(params, chunk, drawn.start, 0, True)
    leave = lambda: predict(params, chunk, noised(chunk, drawn, start), exit_step, final)
    x0 = leave() if start is None else jax.lax.cond(exit_step == 0, lambda: start, leave)
    clean = jax.lax.stop_gradient(x0)
    kept = clean if context is None else context(clean, number)
    return jax.lax.stop_gradient(student.commit(frozen, chunk, kept)), x0, start

  def put(all_, x0, number):
    frames = x0.shape[1]
    return jax.lax.dynamic_update_slice_in_dim(all_, x0, number * frames, axis=1)

  def without_gradient(number, carry):
    state, all_ = carry
    state, x0, _ = one_chunk(frozen, state, number, False)
    return state, put(all_, x0, number)

  def with_gradient(carry, i):
    state, all_ = carry
    number = before + i
    state, x0, start = one_chunk(params, state, number, True)
    return (state, put(all_, jax.lax.stop_gradient(x0), number)), (x0, start)

  before = jnp.asarray(chunks, jnp.int32) - last
  shape = jax.eval_shape(lambda: noise(jnp.int32(0)).start)
  b, frames, *rest = shape.shape
  all_ = jnp.zeros((b, most * frames, *rest), jnp.float32)
  carry = jax.lax.fori_loop(0, before, without_gradient, (student.init(frozen), all_))
  (_, all_), (latents, starts) = jax.lax.scan(with_gradient, carry, jnp.arange(last))
  join = lambda x: jnp.moveaxis(x, 0, 1).reshape(b, last * frames, *rest)
  return Rollout(join(latents), None if starts is None else join(starts), all_)


def follow(
  student: Student,
  params: Any,
  x: Float[Array, "b kc y x z"],
  steps: Int[Array, "b k"],
  clean: Float[Array, "b kc y x z"],
) -> Float[Array, "b kc y x z"]:
  """What a student predicts of each of k chunks of noisy latents, as it streams along clean ones.

  x: each chunk at its denoising step. clean: what is committed in place of the predictions.
  Gradients flow through one forward of each chunk; its past is a constant.
  """
  times = jnp.asarray(student.timesteps, jnp.float32)
  sigmas = jnp.asarray(student.sigmas, jnp.float32)
  frozen, count = jax.lax.stop_gradient(params), steps.shape[1]
  chunks = lambda y: jnp.moveaxis(y.reshape(len(y), count, -1, *y.shape[2:]), 1, 0)

  def one(state, inputs):
    noisy, step, end = inputs
    chunk = student.begin(state)
    flow = student.flow(params, chunk, noisy, times[step], True)
    x0 = schedule.remove_flow(noisy, flow, sigmas[step].reshape(-1, 1, 1, 1, 1))
    return jax.lax.stop_gradient(student.commit(frozen, chunk, end)), x0

  _, x0 = jax.lax.scan(one, student.init(frozen), (chunks(x), steps.T, chunks(clean)))
  return jnp.moveaxis(x0, 0, 1).reshape(x.shape)
