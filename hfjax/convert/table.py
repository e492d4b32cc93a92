"""Name tables: where each tensor of a published checkpoint lives in hfjax, and how it is folded.

One table serves both directions. A layout is an einops pattern from the published tensor to ours
and, read backwards, from ours to the published one.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from einops import rearrange

_SHOWN = 20  # tensors named in an error


class Leaf(NamedTuple):
  """One array of ours: its path, and the published tensors it is made of.

  Several sources are stacked along `axis`. A name with `{i}` stands for one tensor per layer, which
  are stacked along a leading axis.
  """

  path: str
  sources: tuple[str, ...]
  layouts: tuple[str, ...]
  axis: int | None = None

  @property
  def is_layered(self) -> bool:
    """Whether its tensors come once per layer."""
    return "{i}" in self.sources[0]


@dataclasses.dataclass(frozen=True)
class Table:
  """The name table of one architecture.

  init: makes the architecture's parameters; only their shapes are asked for.
  sizes: lengths of the axes that layouts name where shapes do not tell them.
  diffusers: module names of Diffusers or Transformers by original module names, with `{i}`.
  """

  leaves: tuple[Leaf, ...]
  init: Callable[[], Any]
  sizes: Mapping[str, int]
  diffusers: Mapping[str, str]
  layers: int = 1

  @functools.cached_property
  def our_shapes(self) -> dict[str, tuple[int, ...]]:
    """Shape of every array of ours, by path."""
    tree = jax.tree_util.tree_flatten_with_path(jax.eval_shape(self.init))[0]
    return {"/".join(k.key for k in path): x.shape for path, x in tree}

  @functools.cached_property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Shape of every published tensor, by original name; {i} filled in."""
    shapes = {}
    for leaf in self.leaves:
      shape = self.our_shapes[leaf.path][1 if leaf.is_layered else 0 :]
      if leaf.axis is not None:
        shape = shape[: leaf.axis] + shape[leaf.axis + 1 :]
      blank = np.broadcast_to(np.int8(0), shape)  # holds no memory
      for source, layout in zip(leaf.sources, leaf.layouts, strict=True):
        unfolded = self._unfold(blank, layout).shape
        for i in range(self.layers if leaf.is_layered else 1):
          shapes[source.format(i=i)] = unfolded
    return shapes

  def fold(self, x: np.ndarray, layout: str) -> np.ndarray:
    """A published tensor in our layout."""
    return rearrange(x, layout, **self._named_sizes(layout))

  def unfold(self, x: np.ndarray, layout: str) -> np.ndarray:
    """A tensor in our layout as it is published."""
    return np.ascontiguousarray(self._unfold(x, layout))

  def _unfold(self, x: np.ndarray, layout: str) -> np.ndarray:
    theirs, _, ours = layout.partition(" -> ")
    return rearrange(x, f"{ours} -> {theirs}", **self._named_sizes(layout))

  def from_original(self, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Nested parameters from tensors under original names; dtypes stay as they are.

    Raises ValueError that lists missing, unexpected and misshapen tensors, at most 20 by name.
    """
    self.check({name: tensor.shape for name, tensor in tensors.items()})
    params: dict[str, Any] = {}
    for leaf in self.leaves:
      layers = list(self.layers_of(leaf, lambda name: np.asarray(tensors[name])))
      _put(params, leaf.path, np.stack(layers) if leaf.is_layered else layers[0])
    return params

  def to_original(self, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Tensors under original names; the inverse of `from_original`, bit for bit.

    Works for anything shaped like parameters, such as gradients.
    """
    tensors: dict[str, np.ndarray] = {}
    for leaf in self.leaves:
      array: Any = params
      for key in leaf.path.split("/"):
        array = array[key]
      array = np.asarray(array)
      for i, names in enumerate(self.names_of(leaf)):
        parts = self.part(leaf, array[i] if leaf.is_layered else array)
        tensors.update(zip(names, parts, strict=True))
    return tensors

  def names_of(self, leaf: Leaf) -> list[list[str]]:
    """Published tensors of a leaf, layer by layer."""
    count = self.layers if leaf.is_layered else 1
    return [[source.format(i=i) for source in leaf.sources] for i in range(count)]

  def layers_of(self, leaf: Leaf, read: Callable[[str], np.ndarray]) -> Iterator[np.ndarray]:
    """The layers of a leaf, one after the other, from what `read` gives for published names."""
    for names in self.names_of(leaf):
      parts = [self.fold(read(n), layout) for n, layout in zip(names, leaf.layouts, strict=True)]
      yield parts[0] if leaf.axis is None else np.stack(parts, axis=leaf.axis)

  def part(self, leaf: Leaf, array: np.ndarray) -> list[np.ndarray]:
    """The published tensors that one layer of a leaf is made of."""
    pieces = [array] if leaf.axis is None else np.moveaxis(array, leaf.axis, 0)
    return [self.unfold(x, layout) for x, layout in zip(pieces, leaf.layouts, strict=True)]

  def check(self, shapes: Mapping[str, Sequence[int]]):
    """Raises ValueError unless the tensors are those of the architecture, by name and shape."""
    _complain("missing", self.shapes.keys() - shapes.keys())
    _complain("unexpected", shapes.keys() - self.shapes.keys())
    _complain(
      "misshapen",
      [
        f"{name} {list(shapes[name])} instead of {list(want)}"
        for name, want in self.shapes.items()
        if tuple(shapes[name]) != want
      ],
    )

  def diffusers_name(self, name: str) -> str:
    """Diffusers' (or Transformers') name of a tensor, from its original name.

    Raises KeyError if there is none.
    """
    number = re.search(r"\.(\d+)\.", name)
    layer = number[1] if number else None
    for template in (name, re.sub(r"\.\d+\.", ".{i}.", name, count=1)):
      module, _, suffix = template.rpartition(".")
      for found, rest in ((template, ""), (module, f".{suffix}")):
        if found in self.diffusers:
          return self.diffusers[found].format(i=layer) + rest
    raise KeyError(name)

  def _named_sizes(self, layout: str) -> dict[str, int]:
    letters = layout.replace("(", " ").replace(")", " ").split()
    return {k: v for k, v in self.sizes.items() if k in letters}


def linear(path: str, source: str, matrix: str = "o i -> i o", bias: str = "o -> o"):
  """Rows of a linear layer with bias."""
  return (
    Leaf(f"{path}/kernel", (f"{source}.weight",), (matrix,)),
    Leaf(f"{path}/bias", (f"{source}.bias",), (bias,)),
  )


def vector(path: str, source: str, layout: str = "o -> o"):
  """Row of a single tensor, by default a vector."""
  return (Leaf(path, (source,), (layout,)),)


def _put(tree: dict[str, Any], path: str, value: np.ndarray):
  *parents, last = path.split("/")
  for key in parents:
    tree = tree.setdefault(key, {})
  tree[last] = value


def _complain(what: str, tensors):
  if not tensors:
    return
  shown = sorted(tensors)
  more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
  plural = "s" if len(shown) > 1 else ""
  raise ValueError(
    f"The checkpoint has {len(shown)} {what} tensor{plural}: {', '.join(shown[:_SHOWN])}{more}. "
    "Check that it holds the architecture that its configuration says."
  )
