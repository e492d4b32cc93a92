"""Sums over arrays, by which it is seen whether what is read is what was written."""

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hfjax.streaming.trees import named


def checksum(tree: Any) -> int:
  """32 bits that change with any bit of any array of a tree, with its names, shapes and dtypes.

  Arrays are summed where they are, however they are sharded: files are read once only, and a
  checkpoint of 100 GB costs one pass over the memory of the devices. What is restored is held
  against what was saved, so that disks, file systems and libraries are all covered. A change of a
  single number is always seen; of others one in 2^32 is not.
  """
  arrays = named(tree)
  sums = jax.device_get({name: _sum(_words(x)) for name, x in arrays.items()})
  return combined({name: f"{described(arrays[name])} {int(sums[name])}" for name in sums})


def array_sum(x: Any) -> str:
  """An array's part of the checksum of a tree."""
  return f"{described(x)} {int(_sum(_words(x)))}"


def combined(parts: Mapping[str, str]) -> int:
  """The checksum of a tree, of `array_sum` of its arrays by their names."""
  return zlib.crc32("\n".join(f"{name} {parts[name]}" for name in sorted(parts)).encode())


def described(x: Any) -> str:
  """Dtype and shape."""
  return f"{np.dtype(x.dtype)} {tuple(x.shape)}"


def _words(x: Any) -> Any:
  """Arrays that JAX takes without rounding: 64 bits as two words."""
  if isinstance(x, (np.ndarray, np.generic)) and x.dtype.itemsize == 8:
    return np.ascontiguousarray(x)[..., None].view(np.uint32)
  return x


@jax.jit
def _sum(x: Any) -> Any:
  """Sum of the bits of all elements, each times an odd number of its own, modulo 2^32."""
  if x.dtype == bool:
    bits = x.astype(jnp.uint32)
  else:
    size = x.dtype.itemsize
    narrow = {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, narrow).astype(jnp.uint32)
  # Not reshape(-1), which would gather what is sharded.
  index = jnp.zeros(bits.shape, jnp.uint32)
  for axis, length in enumerate(bits.shape):
    index = index * np.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
  # Zeros in a row must count too: a lost chunk is read as zeros.
  return ((bits + np.uint32(0x9E3779B9)) * (2 * index + 1)).sum(dtype=jnp.uint32)
