"""What a stream saw, kept as clean latents, and its window and memory made anew under another text.

Keys and values depend on the prompt under which they were computed, those of the sink for ever.
After a prompt has changed they are therefore computed again, from the latents.
"""

import functools
from collections import deque

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hfjax.models import layers, wan
from hfjax.streaming.config import StreamConfig
from hfjax.streaming.state import StreamState
from hfjax.streaming.step import context_step

# Takes given latents as the next chunk; one compilation for each number of frames.
take = jax.jit(context_step, static_argnames="config", donate_argnames="state")


class History:
  """Clean latents of a stream, in the pieces in which they were committed.

  Those of the sink are kept, and the last ones, of as many frames as are asked for or a few more.
  """

  def __init__(self, sink: int, frames: int):
    self.sink, self.frames = sink, frames
    self.first: list[Array] = []
    self.last: deque[Array] = deque()
    self.total = 0  # frames that were committed so far

  def add(self, piece: Float[Array, "b f y x c"]):
    """Takes the next piece."""
    if _frames(self.first) < self.sink:
      self.first.append(piece)
    self.total += piece.shape[1]
    self.last.append(piece)
    while _frames(self.last) - self.last[0].shape[1] >= self.frames:
      self.last.popleft()

  def pieces(self, most: int | None = None) -> tuple[list[Array], list[Array]]:
    """The frames at the beginning, and those at the end, to be committed in this order.

    most: frames at the end at most, in whole pieces; all that are kept by default. The first are
    the sink's, or fewer where those at the end reach into it.
    """
    last = list(self.last)
    while most is not None and _frames(last) > most:
      last.pop(0)
    need = min(self.sink, self.total - _frames(last))
    first = []
    for piece in self.first:
      if need > 0:
        first.append(piece if piece.shape[1] <= need else piece[:, :need])
        need -= piece.shape[1]
    return first, last


def replay(
  config: StreamConfig,
  params: wan.Params,
  state: StreamState,
  text: layers.TextKV,
  history: History,
  share: float = 0.0,
) -> StreamState:
  """The state under another text: window and memory computed anew; `state` is donated.

  share: how much the frames in the linear memory shall count from now on. At 0 the memory is made
    anew as well, of all latents that `history` has beyond the window. Otherwise the old one stays,
    still of the old text, as if of this share of its frames, so that new ones take its place
    sooner; only the window is computed anew.
  """
  g = config.geometry
  anew = share == 0 or not config.has_memory
  first, last = history.pieces(None if anew else g.window - g.sink)
  chunk, end = state.chunk, state.position
  state = restart(state, text, jnp.float32(share))
  for piece in first:
    state = take(config, params, state, piece)
  state = state._replace(position=end - _frames(last))
  for piece in last:
    state = take(config, params, state, piece)
  return state._replace(chunk=chunk)


@functools.partial(jax.jit, donate_argnames="state")
def restart(state: StreamState, text: layers.TextKV, share: Float[Array, ""]) -> StreamState:
  """A stream that has seen nothing, but for `share` of the frames in its memory."""
  absorbed = jnp.floor(state.absorbed * share).astype(jnp.int32)
  zero = jnp.zeros_like(absorbed)

  def remembered(x):  # [l b ...]
    return jnp.where(absorbed.reshape(1, -1, *(1,) * (x.ndim - 2)) > 0, x, 0)

  return state._replace(
    text=jax.tree.map(lambda new, old: new.astype(old.dtype), text, state.text),
    memory=jax.tree.map(remembered, state.memory),
    absorbed=absorbed,
    length=zero,
    position=zero + 0,  # buffers of their own, so that each can be donated
    chunk=zero + 0,
  )


def _frames(pieces) -> int:
  return sum(piece.shape[1] for piece in pieces)
