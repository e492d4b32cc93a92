"""What every backend is given: arrays, and what is fixed when they are compiled."""

import dataclasses
from typing import NamedTuple

from jaxtyping import Array, Float, Int

from pallas_kernels.pooling import num_blocks

LOG2E = 1.4426950408889634  # scores are in base 2


@dataclasses.dataclass(frozen=True)
class Problem:
  """What is static of one call.

  scale: factor of the scores. block_q, block_k: tokens in a query and in a key block.
  backend: a name in `attention.BACKENDS`. past_gradient: whether gradients of the past keys and
  values are wanted; they are zero otherwise. interpret: run a kernel in its interpreter, on the
  processor, for tests.
  """

  scale: float
  block_q: int
  block_k: int
  backend: str = "xla"
  past_gradient: bool = True
  interpret: bool = False


class Inputs(NamedTuple):
  """Arrays of one call, checked: shapes and dtypes fit together.

  Keys and values lie in one buffer or in two. Blocks of the past buffer come first, ceil(capacity /
  block_k) of them whatever its valid length, then those of the current one. Keys beyond a buffer's
  valid length count for nothing, wherever in a block it ends.
  """

  q: Float[Array, "b s h d"]
  k: Float[Array, "b s h d"]
  v: Float[Array, "b s h d"]
  past_k: Float[Array, "b s h d"] | None
  past_v: Float[Array, "b s h d"] | None
  # int32; the first `count` of a list are distinct, the rest ignored.
  index: Int[Array, "b h q k"]  # type: ignore[assignment]
  # int32, at most the length of the lists.
  count: Int[Array, "b h q"]  # type: ignore[assignment]
  length: Int[Array, "b"]  # int32, valid current keys
  past_length: Int[Array, "b"] | None  # int32, valid past keys

  @property
  def capacity(self) -> int:
    """Tokens that the past buffer has room for."""
    return 0 if self.past_k is None else self.past_k.shape[1]

  def past_blocks(self, block_k: int) -> int:
    """Blocks of the past buffer."""
    return num_blocks(self.capacity, block_k)

  def key_blocks(self, block_k: int) -> int:
    """Blocks of both buffers."""
    return self.past_blocks(block_k) + num_blocks(self.k.shape[1], block_k)


class Gradients(NamedTuple):
  """Cotangents of the arrays of `Inputs` that carry them."""

  q: Float[Array, "b s h d"]
  k: Float[Array, "b s h d"]
  v: Float[Array, "b s h d"]
  past_k: Float[Array, "b s h d"] | None
  past_v: Float[Array, "b s h d"] | None
