"""Examples whose arrays are kept on the devices, where these are small and steps are short."""

import functools
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Shaped

from hfjax import parallel
from hfjax.data.rejects import DataError, Rejects
from hfjax.data.sources import Source

_THREADS = 8


class Resident:
  """The examples of a source, without arrays of one name, which every device has all of.

  name: of the arrays; None where there are none, and `add` shall be called. They are kept in
  float16 if they were stored so, and else as they are. mesh: of the devices. prepare: what becomes
  of an example first. Examples that are damaged, or cannot be prepared, are left out.
  rejects: of the source. nbytes: of the arrays of that name.

  Raises DataError if no example can be read, or their shapes differ.
  """

  def __init__(
    self,
    source: Source,
    name: str | None,
    mesh: Mesh,
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = dict,
  ):
    self.mesh = mesh
    self.rejects: Rejects = getattr(source, "rejects", None) or Rejects()
    half = getattr(source, "dtypes", {}).get(name) == "float16"
    made: list[np.ndarray] = []  # the array of all, of which there shall be no second one
    lock = threading.Lock()

    def room(x: np.ndarray) -> np.ndarray:
      with lock:
        if not made:
          made.append(np.empty((len(source), *x.shape), np.float16 if half else x.dtype))
      if made[0].shape[1:] != x.shape:
        raise DataError(f"Arrays of {name} differ in shape; make the data anew.")
      return made[0]

    def read(i: int) -> dict[str, Any] | None:
      try:
        example = prepare(dict(source[i]))
      except DataError as e:
        if self.rejects.add(str(e), key=i):
          warnings.warn(f"{e} It is left out.", stacklevel=2)
        return None
      if name is not None:
        x = example.pop(name)
        room(x)[i] = x
      return example

    with ThreadPoolExecutor(_THREADS) as pool:
      found = list(pool.map(read, range(len(source))))
    there = [i for i, example in enumerate(found) if example is not None]
    if not there:
      raise DataError(f"All examples are bad. {self.rejects.report()}")
    self._examples = [example for example in found if example is not None]
    self._arrays: dict[str, Array] = {}
    self.nbytes = 0
    if name is not None:
      whole = made[0]
      for place, i in enumerate(there):  # where some are left out, the others move up
        if place != i:
          whole[place] = whole[i]
      self.add(name, whole[: len(there)])
      self.nbytes = self._arrays[name].nbytes

  def add(self, name: str, rows: Shaped[np.ndarray, "n *d"]):
    """Keeps other arrays too, one for each example, the same on every process."""
    where = parallel.replicated(self.mesh)
    self._arrays[name] = jax.make_array_from_process_local_data(where, np.asarray(rows))

  def __contains__(self, name: str) -> bool:
    return name in self._arrays

  def pop(self, name: str) -> list[np.ndarray]:
    """Takes something out of all examples."""
    return [example.pop(name) for example in self._examples]

  def __len__(self) -> int:
    return len(self._examples)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._examples[index]

  def fetch(self, index: Int[np.ndarray, "k b"]) -> dict[str, Array]:
    """All arrays of a batch in k parts, `[k b ...]`, split over devices; float32, or integers.

    index: of this process's share of the batch.
    """
    placed = parallel.put_batch(self.mesh, index.astype(np.int32), axis=1)
    return _taker(self.mesh)(self._arrays, placed)


@functools.cache
def _taker(mesh: Mesh):
  def take(x, index):
    x = x[index]
    return x if jnp.issubdtype(x.dtype, jnp.integer) else x.astype(jnp.float32)

  return jax.jit(
    lambda arrays, index: {name: take(x, index) for name, x in arrays.items()},
    out_shardings=parallel.batched(mesh, 1),
  )
