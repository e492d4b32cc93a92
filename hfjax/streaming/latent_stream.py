"""A stream driven from Python, chunk by chunk, with one compilation for any length."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hfjax.diffusion import guidance
from hfjax.models import wan
from hfjax.streaming.config import StreamConfig
from hfjax.streaming.replay import History, replay, restart, take
from hfjax.streaming.state import init_state
from hfjax.streaming.step import chunk_step, draw_noise

# Latent frames that are kept for another prompt: a clip as models are trained on.
KEPT = 21


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def _advance(config, params, state, keys):
  return chunk_step(config, params, state, draw_noise(config, keys, state.chunk))


class LatentStream:
  """Iterates over chunks of clean latents `[b f y x c]`, without end.

  state: the stream's state after the chunks taken so far; it is donated to the next chunk.
  history: clean latents of the sink and of the last frames, which another prompt is applied to.
  """

  def __init__(
    self,
    config: StreamConfig,
    params: wan.Params,
    context: Float[Array, "b t w"],
    seeds: Sequence[int] | int = 0,
    kept: int = KEPT,
    negative: Float[Array, "b t w"] | None = None,
  ):
    """Begins a stream per row of `context`.

    seeds: one per sample, or one for all, from which each sample takes its own noise.
    kept: latent frames that are kept for a change of prompt, at least those of the window.
    negative: text of the negative prompts, where the configuration has guidance; one for each
      sample, or `[1 t w]` for all.

    Raises ValueError on text of another model or batch, and on negative text that is missing or
    not used.
    """
    self.config, self.params = config, params
    self.context = wan.pad_text(config.model, context)
    self.negative = None if negative is None else jnp.asarray(negative)
    self.state = init_state(config, self._text(self.context))
    self.keys = sample_keys(seeds, self.context.shape[0])
    g = config.geometry
    self.history = History(g.sink, max(kept, g.window))
    self.blend: Blend | None = None

  def warm_up(self):
    """Compiles all that the stream will need, other prompts included, before it begins.

    Raises ValueError if it has begun.
    """
    g, m = self.config.geometry, self.config.model
    if self.history.total:
      raise ValueError(
        f"{self.history.total} frames have been made already; warm a stream up before its first."
      )
    batch, text = self.context.shape[0], self._text(self.context)
    for frames in {g.chunk, g.sink % g.chunk} - {0}:
      blank = jnp.zeros((batch, frames, g.height, g.width, m.in_dim))
      self.state = take(self.config, self.params, self.state, blank)
    self.state, _ = _advance(self.config, self.params, self.state, self.keys)
    self.state = restart(self.state, text, jnp.float32(0))
    jax.block_until_ready(self.state.length)

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
      piece = latents[:, start:stop]
      self.state = take(self.config, self.params, self.state, piece)
      self.history.add(piece)

  def set_context(self, context: Float[Array, "b t w"], blend: int = 0, share: float = 0.0):
    """Goes on under another prompt; a negative one stays.

    blend: chunks over which the text moves from the old prompt to the new one, evenly; by default
      the next chunk has the new one. When it is there, keys and values of the window, the sink's
      included, are computed anew under it, from their latents.
    share: 0 makes the linear memory anew as well, of the latents that are kept; otherwise it stays,
      and counts as this share of its frames (see `replay`).
    With guidance, both are done under the negative prompt too, so that all rows have seen the same.

    Raises ValueError on text of another model or batch, a blend below 0 or a share not from 0 to 1.
    """
    if not isinstance(blend, int) or blend < 0:
      raise ValueError(f"The blend is {blend!r} chunks; give a whole number, 0 for none.")
    if not 0 <= share <= 1:
      raise ValueError(f"The share of the memory is {share}; give a number from 0 to 1.")
    context = wan.pad_text(self.config.model, context)
    if context.shape != self.context.shape:
      raise ValueError(
        f"The stream has {self.context.shape[0]} samples, and the new text {context.shape[0]}; "
        "give a row for each sample."
      )
    self.blend = Blend(self.context, context, blend, share)
    if not blend:
      self._finish_blend(self.blend)

  def __iter__(self) -> Iterator[Float[Array, "b f y x c"]]:
    return self

  def __next__(self) -> Float[Array, "b f y x c"]:
    if self.blend is not None:
      self._step_blend(self.blend)
    self.state, x0 = _advance(self.config, self.params, self.state, self.keys)
    self.history.add(x0)
    return x0

  def _text(self, context):
    c = self.config
    rows = guidance.join_texts(c.model, context, self.negative, c.guidance)
    return wan.text_keys(c.model, self.params, rows, c.compute_dtype)

  def _step_blend(self, blend: "Blend"):
    blend.done += 1
    if blend.done == blend.chunks:
      self._finish_blend(blend)
      return
    self.context = blend.start + blend.done / blend.chunks * (blend.end - blend.start)
    self.state = self.state._replace(text=self._text(self.context))

  def _finish_blend(self, blend: "Blend"):
    self.blend, self.context = None, blend.end
    text = self._text(blend.end)
    self.state = replay(self.config, self.params, self.state, text, self.history, blend.share)


@dataclasses.dataclass
class Blend:
  """A change of prompt under way, over a number of chunks."""

  start: Array
  end: Array
  chunks: int
  share: float
  done: int = 0


def sample_keys(seeds: Sequence[int] | int, batch: int):
  """One random key per sample: of its own seed, or of the common seed and its number."""
  given = seeds if isinstance(seeds, (Sequence, np.ndarray)) else [seeds]
  if any(isinstance(s, (int, np.integer)) and not 0 <= s < 2**32 for s in given):
    raise ValueError(f"The seeds are {seeds}; give numbers from 0 to {2**32 - 1}.")
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
