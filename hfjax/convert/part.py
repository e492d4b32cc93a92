"""A model of a checkpoint, whatever it is read from, and its tensors from arrays of ours."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hfjax.convert import source
from hfjax.convert.registry import Kind
from hfjax.convert.source import Tensor, Tensors
from hfjax.convert.table import Leaf, Table


@dataclasses.dataclass(frozen=True)
class Part:
  """One model of a checkpoint.

  tensors: under original names, complete. variant: semantics it was trained with.
  origin: what it was read from, for the record. notes: sentences for the user.
  preset: how a transformer is meant to be sampled, a name in `SAMPLING_PRESETS`.
  """

  kind: Kind
  config: Any
  tensors: Tensors
  variant: str | None
  origin: Mapping[str, Any]
  notes: Sequence[str] = ()
  preset: str | None = None

  @property
  def table(self) -> Table:
    """Its name table."""
    return self.kind.table(self.config)


def named_tensors(
  table: Table, arrays: Tensors, dtypes: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
  """Tensors under original names from arrays of ours by path, those of an array after each other.

  dtypes: codes of tensors that share an array with wider ones, by name.
  """
  codes = dtypes or {}
  tensors: dict[str, Tensor] = {}
  for leaf in table.leaves:
    array = arrays[leaf.path]
    for i, names in enumerate(table.names_of(leaf)):
      for n, name in enumerate(names):
        dtype = source.DTYPES[codes[name]] if name in codes else array.dtype
        read = _reader(table, leaf, array, i if leaf.is_layered else None, n, dtype)
        tensors[name] = Tensor(table.shapes[name], dtype, read)
  return tensors


def _reader(table: Table, leaf: Leaf, array: Tensor, layer: int | None, number: int, dtype):
  def read(row: int | None = None) -> np.ndarray:
    x = table.part(leaf, array.read(layer))[number].astype(dtype, copy=False)
    return x if row is None else x[row]

  return read
