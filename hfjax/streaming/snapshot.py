"""A stream as named arrays, to be saved and gone on with elsewhere."""

from collections import deque
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from hfjax.models import wan
from hfjax.streaming.config import StreamConfig
from hfjax.streaming.latent_stream import Blend, LatentStream
from hfjax.streaming.replay import History
from hfjax.streaming.trees import named, renamed


def to_arrays(stream: LatentStream) -> dict[str, np.ndarray]:
  """All that a stream is, but for its configuration and parameters, on the host."""
  history, blend = stream.history, stream.blend
  tree = {
    "state": stream.state,
    "keys": jax.random.key_data(stream.keys),
    "context": stream.context,
    "history": {
      "first": _numbered(history.first),
      "last": _numbered(history.last),
      "kept": np.int64(history.frames),
      "total": np.int64(history.total),
    },
  }
  if stream.negative is not None:
    tree["negative"] = stream.negative
  if blend is not None:
    tree["blend"] = {
      "start": blend.start,
      "end": blend.end,
      "chunks": np.int64(blend.chunks),
      "done": np.int64(blend.done),
      "share": np.float64(blend.share),
    }
  return {name: np.array(x) for name, x in named(tree).items()}


def from_arrays(
  config: StreamConfig, params: wan.Params, arrays: Mapping[str, np.ndarray]
) -> LatentStream:
  """The stream that `to_arrays` was given; it goes on with the same bits.

  Raises ValueError, which lists what does not fit, on arrays of another configuration or of none.
  """
  context, negative = arrays.get("context"), arrays.get("negative")
  if context is None or context.ndim != 3 or "keys" not in arrays:
    raise ValueError(
      f"There are {len(arrays)} arrays, and none of them is a stream's text; give what to_arrays "
      "returned."
    )
  stream = LatentStream(
    config,
    params,
    jnp.asarray(context),
    kept=int(_scalar(arrays, "history/kept")),
    negative=None if negative is None else jnp.asarray(negative),
  )
  state = {k: v for k, v in arrays.items() if k.startswith("state/")}
  stream.state = renamed({"state": stream.state}, state)["state"]
  stream.keys = jax.random.wrap_key_data(jnp.asarray(arrays["keys"]))
  history = stream.history = History(config.geometry.sink, int(_scalar(arrays, "history/kept")))
  history.first = _listed(arrays, "history/first/")
  history.last = deque(_listed(arrays, "history/last/"))
  history.total = int(_scalar(arrays, "history/total"))
  if "blend/start" in arrays:
    stream.blend = Blend(
      jnp.asarray(arrays["blend/start"]),
      jnp.asarray(arrays["blend/end"]),
      int(_scalar(arrays, "blend/chunks")),
      float(_scalar(arrays, "blend/share")),
      int(_scalar(arrays, "blend/done")),
    )
  return stream


def _numbered(pieces) -> dict[str, jax.Array]:
  return {f"{i:05d}": piece for i, piece in enumerate(pieces)}


def _listed(arrays: Mapping[str, np.ndarray], prefix: str) -> list[jax.Array]:
  return [jnp.asarray(arrays[name]) for name in sorted(arrays) if name.startswith(prefix)]


def _scalar(arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
  if name not in arrays or arrays[name].size != 1:
    raise ValueError(f"The saved stream has no number {name}; give what to_arrays returned.")
  return arrays[name].reshape(())
