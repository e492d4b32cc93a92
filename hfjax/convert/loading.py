"""Loading a model of a checkpoint onto devices."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from hfjax.convert import checkpoint
from hfjax.convert.source import CheckpointError, Tensor

# What a repository of weights holds that conversion reads.
_WANTED = ("*.safetensors", "*.json", "*.pth", "*.pt", "*.model")
_TIMEOUT = 10  # seconds that the Hub gets to answer


class Loaded(NamedTuple):
  """A model: its configuration, its parameters on devices, and the variant they were trained as."""

  config: Any
  params: dict[str, Any]
  variant: str | None


def load(
  path_or_hub_id: str | Path,
  model: str = "dit",
  sharding: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
  dtype: Any = None,
) -> Loaded:
  """One model of a local folder or file, or of a repository of the Hugging Face Hub.

  hfjax folders are mapped into memory, and each device reads its own part. Other formats are folded
  array by array on the host; convert them once with tools/convert_checkpoint.py to load faster.

  model: "dit", "vae", "umt5" or "taehv".
  sharding: where an array goes, from its path ("blocks/ffn_in/kernel") and shape; the first device
    by default. dtype: of the parameters; as stored by default.

  Raises CheckpointError with a sentence if there is nothing to load.
  """
  path = Path(path_or_hub_id)
  if not path.exists():
    path = _download(str(path_or_hub_id))
  place = sharding or (lambda name, shape: jax.sharding.SingleDeviceSharding(jax.devices()[0]))
  for folder in (path, path / model):
    if folder.is_dir() and checkpoint.is_hfjax(folder):
      kind, config, info = checkpoint.read_config(folder)
      if kind.name == model:
        arrays = checkpoint.our_arrays(folder, kind, config)
        mapped = {name: _map(tensor) for name, tensor in arrays.items()}
        return Loaded(config, _put(mapped, place, dtype), info.get("variant"))
  parts = [p for p in checkpoint.open_parts(path, model) if p.kind.name == model]
  if not parts:
    raise CheckpointError(f"{path} holds no {model}; give a checkpoint that does.")
  part, table = parts[0], parts[0].table
  folded = {leaf.path: _fold(part, table, leaf) for leaf in table.leaves}
  return Loaded(part.config, _put(folded, place, dtype), part.variant)


def _map(tensor: Tensor) -> Callable[[], np.ndarray]:
  def read() -> np.ndarray:
    if tensor.file is None or tensor.nbytes == 0:
      return tensor.read()
    return np.memmap(tensor.file, tensor.dtype, "r", tensor.offset, tensor.shape)

  return read


def _fold(part, table, leaf) -> Callable[[], np.ndarray]:
  def read() -> np.ndarray:
    layers = [
      table.join(leaf, [part.tensors[s.format(i=i)].read() for s in leaf.sources])
      for i in range(table.layers if leaf.is_layered else 1)
    ]
    return np.stack(layers) if leaf.is_layered else layers[0]

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
  def part(index) -> np.ndarray:
    return np.asarray(host[index]).astype(dtype or host.dtype)

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
      f"{name} is not here and could not be downloaded ({reason}). On a machine with access, run "
      f"'hf download {name} --local-dir DIR', bring DIR here, and give its path."
    ) from e
