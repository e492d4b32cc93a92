"""Loading a model of a checkpoint onto devices."""

import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hfjax.convert import checkpoint, runs, source, stored, write
from hfjax.convert.registry import KINDS
from hfjax.convert.source import CheckpointError, Tensor

# What a repository of weights holds that conversion reads.
_WANTED = ("*.safetensors", "*.json", "*.pth", "*.pt", "*.model")
_TIMEOUT = 10  # seconds that the Hub gets to answer


class Loaded(NamedTuple):
  """A model: its configuration, its parameters on devices, and the variant they were trained as.

  preset: how a transformer is meant to be sampled, a name in `SAMPLING_PRESETS`; None for others.
  """

  config: Any
  params: dict[str, Any]
  variant: str | None
  preset: str | None = None


def load(
  path_or_hub_id: str | Path,
  model: str = "dit",
  sharding: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
  dtype: Any = None,
  verify: bool = False,
  averaged: bool = False,
) -> Loaded:
  """One model of a local folder or file, or of a repository of the Hugging Face Hub.

  Of a run of training, the weights of its newest step; tools/convert_checkpoint.py has others.

  hfjax folders are mapped into memory, and each device reads its own part. Other formats are folded
  array by array on the host; convert them once with tools/convert_checkpoint.py to load faster.

  model: "dit", "vae", "umt5" or "taehv".
  sharding: where an array goes, from its path ("blocks/ffn_in/kernel") and shape; by default to the
    first device, without being bound to it, as what JAX makes itself.
  dtype: of the parameters, "bf16" as in the converter or any that weights have; as stored by
    default. verify: hold the files of an hfjax folder against the hashes that it records,
    which reads them once more. averaged: take moving averages of weights, of runs and of trainers'
    files.

  Warns of what was assumed or left out in other formats and in old folders, as the converter says
  it.
  Raises CheckpointError with a sentence if there is nothing to load, or not as is asked.
  """
  if model not in KINDS:
    raise CheckpointError(f"There is no model {model!r}; load one of {', '.join(KINDS)}.")
  path = locate(path_or_hub_id)
  dtype = _dtype(dtype)
  folder = None if runs.is_run(path) else stored.hfjax_models(path).get(model)
  if folder and not averaged:
    if verify:
      stored.verify(folder)
    kind, config, info = stored.read_config(folder)
    arrays = stored.our_arrays(folder, kind, config)
    mapped = {name: _map(tensor) for name, tensor in arrays.items()}
    notes: list[str] = []
    variant, preset = checkpoint.recorded_semantics(kind, config, info, notes)
    for note in notes:
      warnings.warn(source.printable(note), stacklevel=2)
    return Loaded(config, _put(mapped, sharding, dtype), variant, preset)
  if verify:
    raise CheckpointError(
      f"{path} is no hfjax folder with a {model}, so there are no hashes to verify; leave verify "
      "out, or convert it with tools/convert_checkpoint.py."
    )
  part = checkpoint.open_parts(path, model, averaged=averaged)[0]
  for note in part.notes:
    warnings.warn(source.printable(note), stacklevel=2)
  rows, _ = checkpoint.entries(part, "hfjax", None)
  folded = {entry.name: _fold(entry) for entry in rows}
  return Loaded(part.config, _put(folded, sharding, dtype), part.variant, part.preset)


def locate(path_or_hub_id: str | Path) -> Path:
  """The local file or folder, or a local copy of the Hub's repository, downloaded if need be.

  Raises CheckpointError if there is none, or if a conversion has not ended there.
  """
  path = source.user_path(path_or_hub_id)
  write.check_whole(path)
  return path if os.path.lexists(path) else _download(str(path_or_hub_id))


def _dtype(dtype: Any) -> np.dtype | None:
  """As numpy has it; CheckpointError if it is no floating one."""
  if dtype is None:
    return None
  try:
    found = np.dtype(checkpoint.CASTS.get(dtype, dtype) if isinstance(dtype, str) else dtype)
  except TypeError:
    found = np.dtype(np.int8)
  if found not in source.DTYPES.values():
    raise CheckpointError(f"Parameters cannot be {dtype!r}; give bf16, float32 or float16.")
  return found


def _map(tensor: Tensor) -> Callable[[], np.ndarray]:
  def read() -> np.ndarray:
    if tensor.file is None or tensor.nbytes == 0:
      return tensor.read()
    return np.memmap(tensor.file, tensor.dtype, "r", tensor.offset, tensor.shape)

  return read


def _fold(entry: write.Entry) -> Callable[[], np.ndarray]:
  def read() -> np.ndarray:
    array = np.empty(entry.shape, entry.dtype)
    flat, at = array.reshape(-1), 0
    for piece in entry.pieces():
      flat[at : at + piece.size] = piece.reshape(-1)
      at += piece.size
    return array

  return read


def _put(arrays: dict[str, Callable[[], np.ndarray]], place, dtype) -> dict[str, Any]:
  """Arrays on their devices, as nested parameters; one of them is on the host at a time."""
  params: dict[str, Any] = {}
  for name, read in arrays.items():
    array = _place(read(), place, name, dtype)
    tree, last = params, name.split("/")
    for key in last[:-1]:
      tree = tree.setdefault(key, {})
    tree[last[-1]] = array
  return params


def _place(host: np.ndarray, place, name: str, dtype) -> jax.Array:
  dtype = dtype or host.dtype
  if jax.dtypes.canonicalize_dtype(dtype) != dtype:
    raise CheckpointError(
      f"JAX holds {name} as {dtype} only with its jax_enable_x64; set that, or load with "
      "dtype='float32'."
    )

  def part(index) -> np.ndarray:
    # A copy: JAX may keep what it is given, and mapped files change.
    return checkpoint.cast_checked(np.array(host[index]), dtype, name)

  if place is None:
    return jnp.asarray(part(...))
  return jax.make_array_from_callback(host.shape, place(name, host.shape), part)


def _download(name: str) -> Path:
  """Local copy of a repository of the Hub; CheckpointError if it cannot be had."""
  if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
    raise CheckpointError(
      f"{name} is neither a file or folder here nor the name of a Hub repository (owner/name)."
    )
  import huggingface_hub

  try:
    return Path(
      huggingface_hub.snapshot_download(name, allow_patterns=list(_WANTED), etag_timeout=_TIMEOUT)
    )
  except Exception as e:
    reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
    raise CheckpointError(
      f"There is no file or folder {name} here, and as a repository of the Hub it could not be "
      f"downloaded ({reason}). On a machine with access, run "
      f"'hf download {name} --local-dir DIR', bring DIR here, and give its path."
    ) from e
