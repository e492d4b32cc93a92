"""A stream driven from Python, chunk by chunk, with one compilation for any length."""

import functools
import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hfjax.models import wan
from hfjax.streaming.config import StreamConfig
from hfjax.streaming.state import init_state
from hfjax.streaming.step import chunk_step, context_step, draw_noise


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def _advance(config, params, state, keys):
  return chunk_step(config, params, state, draw_noise(config, keys, state.chunk))


_take = jax.jit(context_step, static_argnames="config", donate_argnames="state")


class Stream:
  """Iterates over chunks of clean latents `[b f y x c]`, without end.

  state: the stream's state after the chunks taken so far; it is donated to the next chunk.
  """

  def __init__(
    self,
    config: StreamConfig,
    params: wan.Params,
    context: Float[Array, "b t w"],
    seeds: Sequence[int] | int = 0,
  ):
    """Begins a stream per row of `context`.

    seeds: one per sample, or one for all, from which each sample takes its own noise.
    """
    self.config, self.params = config, params
    context = jnp.asarray(context)
    text = wan.text_keys(config.model, params, context, config.compute_dtype)
    self.state = init_state(config, text)
    self.keys = sample_keys(seeds, context.shape[0])

  def extend(self, latents: Float[Array, "b f y x c"]):
    """Takes given clean latents as the next frames (an image, or a clip to continue).

    They enter in whole chunks; what they lack of whole chunks goes first, as a shorter one, so
    that a single frame or any number of frames will do.
    """
    latents = jnp.asarray(latents)
    frames = latents.shape[1] if latents.ndim == 5 else 0
    if not frames:
      raise ValueError(
        f"Context latents have shape {tuple(latents.shape)}; give [batch, frames, rows, "
        "columns, channels] with at least one frame."
      )
    chunk = self.config.geometry.chunk
    cuts = [0, *range(frames % chunk or chunk, frames + 1, chunk)]
    for start, stop in itertools.pairwise(cuts):
      self.state = _take(self.config, self.params, self.state, latents[:, start:stop])

  def __iter__(self) -> Iterator[Float[Array, "b f y x c"]]:
    return self

  def __next__(self) -> Float[Array, "b f y x c"]:
    self.state, x0 = _advance(self.config, self.params, self.state, self.keys)
    return x0


def sample_keys(seeds: Sequence[int] | int, batch: int):
  """One random key per sample: of its own seed, or of the common seed and its number."""
  if isinstance(seeds, (int, np.integer)):
    key = jax.random.key(int(seeds))
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(batch))
  if not isinstance(seeds, (Sequence, np.ndarray)) or isinstance(seeds, str):
    raise ValueError(f"The seeds are {seeds!r}; give a whole number, or one for each sample.")
  if any(not isinstance(s, (int, np.integer)) for s in seeds):
    raise ValueError(f"The seeds are {list(seeds)}; they must be whole numbers.")
  if len(seeds) != batch:
    raise ValueError(
      f"{len(seeds)} seeds were given for {batch} samples; give one each, or a single "
      "number for all."
    )
  return jnp.stack([jax.random.fold_in(jax.random.key(int(s)), 0) for s in seeds])
