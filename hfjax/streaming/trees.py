"""Trees of arrays as arrays by name, and back."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def named(tree: Any) -> dict[str, Any]:
  """Leaves by their paths, such as "state/memory/kv"."""
  flat = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def renamed(like: Any, arrays: Mapping[str, np.ndarray]) -> Any:
  """The tree of the structure of `like` with the arrays of its names, on the device.

  Raises ValueError, which lists what does not fit, unless names, dtypes and shapes are those of
  `like`.
  """
  leaves, tree = jax.tree.flatten(like)
  names = list(named(like))
  wrong = [
    f"{name} is {_shape(arrays.get(name))} instead of {_shape(leaf)}"
    for name, leaf in zip(names, leaves, strict=True)
    if _shape(arrays.get(name)) != _shape(leaf)
  ]
  wrong += [f"{name} has no place" for name in arrays if name not in names]
  if wrong:
    raise ValueError(
      f"The saved stream is of another configuration ({'; '.join(wrong[:5])}); use the one that it "
      "was saved under."
    )
  return jax.tree.unflatten(tree, [jnp.array(arrays[name]) for name in names])


def part(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
  """Arrays whose names begin so, without this beginning."""
  return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def _shape(x: Any) -> str:
  return "missing" if x is None else f"{x.dtype} {tuple(x.shape)}"
