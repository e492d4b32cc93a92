"""Many chunks at once: one `lax.scan`, compiled once per number of chunks."""

import functools

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from hfjax.models import checks, wan
from hfjax.streaming.config import StreamConfig
from hfjax.streaming.state import StreamState, check_state
from hfjax.streaming.step import chunk_step, draw_noise


def generate(
  config: StreamConfig, params: wan.Params, state: StreamState, keys: PRNGKeyArray, n_chunks: int
) -> tuple[StreamState, Float[Array, "b f y x c"]]:
  """Generates `n_chunks` chunks; `state` is donated.

  keys: one typed key per sample, `[b]`; noise derives from it and the chunk number only, so that
    the result does not depend on how a stream is divided into calls.

  Returns the state after them and the clean latents of all their frames, float32. Beyond these
  latents, memory does not depend on `n_chunks`.
  """
  if not isinstance(n_chunks, int) or n_chunks < 1:
    raise ValueError(f"{n_chunks} chunks were asked for; ask for a whole number, at least 1.")
  check_state(config, state)
  checks.check_batch("set of keys", keys, state.length.shape[0] // config.texts)
  return _generate(config, params, state, keys, n_chunks)


@functools.partial(jax.jit, static_argnames=("config", "n_chunks"), donate_argnames="state")
def _generate(config, params, state, keys, n_chunks):
  def step(state, _):
    return chunk_step(config, params, state, draw_noise(config, keys, state.chunk))

  state, x0 = jax.lax.scan(step, state, length=n_chunks)
  n, b, f, *rest = x0.shape
  return state, x0.swapaxes(0, 1).reshape(b, n * f, *rest)
