"""Examples whose arrays are kept on the device, where these are small and steps are short."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hfjax.data.rejects import DataError, Rejects
from hfjax.data.sources import Source

_THREADS = 8


class Resident:
  """A source whose examples have an `index` in place of an array, which `fetch` turns into it.

  Arrays are kept in float16 if they were stored so, and else as they are. Damaged examples are
  left out. rejects: of the source.

  Raises DataError if no example can be read, or their shapes differ.
  """

  def __init__(self, source: Source, name: str):
    self.name = name
    self.rejects: Rejects = getattr(source, "rejects", None) or Rejects()
    half = getattr(source, "dtypes", {}).get(name) == "float16"

    def read(i: int) -> tuple[dict[str, Any], np.ndarray] | None:
      try:
        example = dict(source[i])
      except DataError as e:
        if self.rejects.add(str(e), key=i):
          warnings.warn(f"{e} It is left out.", stacklevel=2)
        return None
      x = example.pop(name)
      return example, x.astype(np.float16) if half else x

    with ThreadPoolExecutor(_THREADS) as pool:
      found = [x for x in pool.map(read, range(len(source))) if x is not None]
    if not found:
      raise DataError(f"All examples are bad. {self.rejects.report()}")
    shapes = {x.shape for _, x in found}
    if len(shapes) > 1:
      raise DataError(f"Arrays of {name} differ in shape; make the data anew.")
    self._examples = [example for example, _ in found]
    self._arrays = jnp.asarray(np.stack([x for _, x in found]))

  @property
  def nbytes(self) -> int:
    """Bytes of all arrays."""
    return self._arrays.nbytes

  def __len__(self) -> int:
    return len(self._examples)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {**self._examples[index], "index": np.int32(index)}

  def fetch(self, index: np.ndarray) -> dict[str, Array]:
    """The arrays of a batch, `[b ...]`, on the device; float32, or bytes."""
    return {self.name: _take(self._arrays, jnp.asarray(index))}


@jax.jit
def _take(arrays, index):
  x = arrays[index]
  return x if x.dtype == jnp.uint8 else x.astype(jnp.float32)
