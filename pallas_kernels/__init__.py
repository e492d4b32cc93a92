"""Block-sparse attention: the public function, the block map, and one file per backend.

Knows nothing of hfjax. Dimension letters: b batch, s query or key tokens, h heads, d head
dimension, q query blocks, n key blocks, k listed blocks.
"""

from pallas_kernels.attention import BACKENDS, block_sparse_attention
from pallas_kernels.block_map import block_map
from pallas_kernels.pooling import (
  block_means,
  center_keys,
  choose_blocks,
  kept_counts,
  num_blocks,
)

__all__ = [
  "BACKENDS",
  "block_map",
  "block_means",
  "block_sparse_attention",
  "center_keys",
  "choose_blocks",
  "kept_counts",
  "num_blocks",
]
