"""Prompts with their text contexts, computed once for all of training."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hfjax import convert, pipeline
from hfjax.convert import checkpoint, stored
from hfjax.data import shards
from hfjax.data.rejects import DataError
from hfjax.data.sources import Source
from hfjax.models.presets import PRESETS, WanConfig, preset

# Text contexts `[b t w]`, zero where there is no text, of a list of prompts.
Encode = Callable[[Sequence[str]], Array]


def text_encoder(
  weights: str | Path, dtype: Any = None
) -> pipeline.TextEncoder | pipeline.RandomText:
  """The text encoder of a folder or Hub repository, or of "random:NAME", and nothing else of it.

  dtype: of weights and computing, bfloat16 by default.

  Raises CheckpointError if there is none.
  """
  dtype = jnp.dtype(jnp.bfloat16 if dtype is None else dtype)
  name = str(weights)
  try:
    if name.startswith("random:"):
      return pipeline.RandomText(preset(name.removeprefix("random:")))
    path = convert.locate(weights)
    return pipeline.TextEncoder(path, _model(path), dtype)
  except (FileNotFoundError, ValueError) as e:
    raise convert.CheckpointError(str(e)) from e


def write(
  folder: str | Path,
  source: Source,
  encode: Encode,
  *,
  batch: int = 8,
  model: str = "",
  count: int | None = None,
  per_shard: int = 0,
  command: str = "",
  **options: Any,
) -> shards.Written:
  """Writes prompts and their contexts `[t w]`, without the rows of zeros at the end.

  Contexts of encoders that compute in bfloat16 are kept as that, others as float32; see `encoded`.

  source: of prompts. model: what the encoder is called; a folder is gone on with by no other.
  count: of the prompts, the first ones. options: see `shards.write`, whose errors are raised.
  """
  count = len(source) if count is None else min(count, len(source))
  arrays = {"context": context_array(encode)}
  about = {"prompts": identity(source), "model": model}
  plan = shards.Plan("prompts", count, arrays, about, per_shard, command)

  def make(start: int, stop: int, reject) -> Iterable[shards.Example]:
    for numbers in shards.batches(start, stop, batch):
      prompts = [example["prompt"] for example in readable(source, numbers, reject)[1]]
      if not prompts:
        continue
      contexts = encoded(encode, filled(prompts, batch))
      for prompt, context in zip(prompts, contexts[: len(prompts)], strict=True):
        yield {"prompt": prompt, "context": trimmed(context)}

  return shards.write(folder, plan, make, **options)


def encoded(encode: Encode, prompts: Sequence[str]) -> Float[np.ndarray, "b t w"]:
  """Contexts in float32, of the precision that the encoder computes in."""
  rows = np.asarray(encode(prompts), np.float32)
  # Compilers keep more digits than bfloat16 has, where float32 comes next; others would not.
  return rows.astype(jnp.bfloat16).astype(np.float32) if _is_half(encode) else rows


def _is_half(encode: Encode) -> bool:
  return getattr(encode, "dtype", None) == jnp.bfloat16


def context_array(maker: Encode | Source) -> tuple[shards.Shape, str]:
  """How contexts are stored that an encoder or a source gives: shape and dtype."""
  if callable(maker):
    return (None, maker(["a"]).shape[-1]), "bfloat16" if _is_half(maker) else "float32"
  dtypes, shapes = getattr(maker, "dtypes", {}), getattr(maker, "shapes", None)
  width = (shapes["context"] if shapes else maker[0]["context"].shape)[-1]
  return (None, width), dtypes.get("context", "float32")


def has_contexts(source: Source) -> bool:
  """Whether a source holds contexts of its prompts; of stored ones no example is read."""
  shapes = getattr(source, "shapes", None)
  return "context" in (source[0] if shapes is None else shapes)


def readable(
  source: Source, numbers: Sequence[int], reject: Callable[[str], Any]
) -> tuple[list[int], list[dict[str, Any]]]:
  """The examples of these numbers that can be read, and their numbers; others are rejected."""
  found = {}
  for i in numbers:
    try:
      found[i] = source[i]
    except DataError as e:
      reject(str(e))
  return [*found], [*found.values()]


def trimmed(context: Float[np.ndarray, "t w"]) -> Float[np.ndarray, "u w"]:
  """A context without the rows of zeros at its end, but with one row at least."""
  rows = np.flatnonzero(context.any(axis=1))
  return context[: max(1, rows[-1] + 1 if len(rows) else 0)]


def filled(items: Sequence[Any], size: int) -> list[Any]:
  """A batch that is too short, filled up with its last item, so that one program serves all."""
  return [*items, *[items[-1]] * (size - len(items))]


def identity(source: Source) -> str:
  """A short name of what a source holds."""
  known = getattr(source, "identity", None)
  return known or shards.digest([source[i]["prompt"] for i in range(len(source))])


def fingerprint(params: Any) -> str:
  """A short name of weights: of their shapes and of some numbers of each array."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  ends = jax.device_get([_ends(x) for _, x in leaves])
  rows = [
    [jax.tree_util.keystr(path), [*x.shape], np.asarray(end, np.float32).tolist()]
    for (path, x), end in zip(leaves, ends, strict=True)
  ]
  return shards.digest(rows)


def _ends(x: Array) -> Array:
  """Some numbers of the first and last rows of an array."""
  if not x.ndim:
    return x[None]
  first, last = (x[(i,) * (x.ndim - 1)] for i in (0, -1))
  return jnp.concatenate([first[:8], last[-8:]])


def _model(path: Path) -> WanConfig:
  """The transformer that the text is for; Wan's sizes where there is only a text encoder."""
  found = stored.hfjax_models(path) if path.is_dir() else {}
  if "dit" in found:
    return stored.read_config(found["dit"])[1]
  if "umt5" in found:
    return PRESETS["wan-1.3b"]
  if not path.is_dir():
    raise DataError(f"{path} is a file; give a folder with a text encoder and its tokenizer.")
  return checkpoint.open_parts(path, "dit")[0].config
