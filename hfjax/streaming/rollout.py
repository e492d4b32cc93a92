"""Many chunks at once: one `lax.scan`, compiled once per number of chunks."""

import functools

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from hfjax.models import wan
from hfjax.streaming.config import StreamConfig
from hfjax.streaming.state import StreamState
from hfjax.streaming.step import chunk_step, draw_noise


@functools.partial(jax.jit, static_argnames=("config", "n_chunks"), donate_argnames="state")
def generate(
  config: StreamConfig, params: wan.Params, state: StreamState, keys: PRNGKeyArray, n_chunks: int
) -> tuple[StreamState, Float[Array, "b f y x c"]]:
  """Generates `n_chunks` chunks; `state` is donated.

  keys: one typed key per sample, `[b]`; noise derives from it and the chunk number only, so that
    the result does not depend on how a stream is divided into calls.

  Returns the state after them and the clean latents of all their frames, float32. Beyond these
  latents, memory does not depend on `n_chunks`.
  """
  if n_chunks < 1:
    raise ValueError(f"{n_chunks} chunks were asked for; ask for at least 1.")

  def step(state, _):
    return chunk_step(config, params, state, draw_noise(config, keys, state.chunk))

  state, x0 = jax.lax.scan(step, state, length=n_chunks)
  n, b, f, *rest = x0.shape
  return state, x0.swapaxes(0, 1).reshape(b, n * f, *rest)
