"""Meshes and shardings: who holds what, for training on any number of devices.

Two axes, `data` and `fsdp`, share each batch; over `fsdp` parameters and what belongs to them
(averages, moments of optimizers) are split too. Everything else is XLA's partitioner.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")
# Arrays below this many numbers are kept whole: to gather them takes longer than to hold them.
SMALLEST = 2**20


def make_mesh(fsdp: int = -1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh of all devices, `fsdp` of which share one set of parameters; -1 for all.

  Raises ValueError unless the devices divide into such groups.
  """
  devices = jax.devices() if devices is None else devices
  size = len(devices) if fsdp == -1 else fsdp
  if size < 1 or len(devices) % size:
    raise ValueError(
      f"{len(devices)} devices do not divide into groups of {fsdp} that share parameters; set fsdp "
      "to a divisor of their number, or to -1 for all of them."
    )
  return Mesh(
    np.asarray(devices).reshape(-1, size), AXES, axis_types=(AxisType.Auto, AxisType.Auto)
  )


def spec(mesh: Mesh, shape: Sequence[int], smallest: int = SMALLEST) -> PartitionSpec:
  """Which axis of an array is split over `fsdp`: the longest that divides, the last of equals.

  Arrays of fewer than `smallest` numbers, and those of which no axis divides, are kept whole.
  """
  size = mesh.shape["fsdp"]
  fitting = [(length, i) for i, length in enumerate(shape) if length and length % size == 0]
  if size == 1 or math.prod(shape) < smallest or not fitting:
    return PartitionSpec()
  _, axis = max(fitting)
  return PartitionSpec(*(None,) * axis, "fsdp")


def shardings(mesh: Mesh, tree: Any, smallest: int = SMALLEST) -> Any:
  """Shardings of a tree of arrays, or of their shapes, by `spec`."""
  return jax.tree.map(lambda x: NamedSharding(mesh, spec(mesh, x.shape, smallest)), tree)


def abstract(mesh: Mesh, tree: Any, smallest: int = SMALLEST) -> Any:
  """Shapes, dtypes and shardings of a tree of arrays or shapes."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh, spec(mesh, x.shape, smallest))
    ),
    tree,
  )


def placing(
  mesh: Mesh, smallest: int = SMALLEST
) -> Callable[[str, tuple[int, ...]], NamedSharding]:
  """Where `convert.load` puts an array of a given name and shape."""
  return lambda name, shape: NamedSharding(mesh, spec(mesh, shape, smallest))


def replicated(mesh: Mesh) -> NamedSharding:
  """All of it everywhere."""
  return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """Split over all devices along the batch's axis."""
  return NamedSharding(mesh, PartitionSpec(*(None,) * axis, AXES))


def check_batch(mesh: Mesh, batch: int):
  """Raises ValueError unless a batch divides among all devices of the mesh."""
  if batch < 1 or batch % mesh.size:
    raise ValueError(
      f"A batch of {batch} does not divide among {mesh.size} devices; make it a multiple of "
      f"{mesh.size}."
    )


def put_batch(mesh: Mesh, tree: Any, axis: int = 0) -> Any:
  """A batch as arrays over all devices, of what each process has of it; axis: the batch's."""
  where = batched(mesh, axis)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(where, np.asarray(x)), tree)


def create(make: Callable[..., Any], mesh: Mesh, *args: Any, smallest: int = SMALLEST) -> Any:
  """What `make(*args)` gives, created where it shall lie, never whole on one device."""
  out = shardings(mesh, jax.eval_shape(make, *args), smallest)
  return jax.jit(make, out_shardings=out)(*args)
