"""The block map in Triton, called through jax-triton: NVIDIA GPUs from Ampere on.

What runs on the GPU is in `triton_map_kernels`. Nothing here is differentiated.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import device, triton
from pallas_kernels.pooling import num_blocks


class Tuning(NamedTuple):
  """How the kernels are compiled.

  mean_warps: warps of a program of `block_means`, for blocks of 64 x 128 two-byte numbers; others
  in proportion. rows, depth: query blocks of a program of `choose_blocks`, and numbers of a mean in
  one step of its product. warps, stages: `num_warps` and `num_stages` of it.
  """

  mean_warps: int = 1
  rows: int = 8
  depth: int = 64
  warps: int = 4
  stages: int = 3


# It is read when a call is traced.
TUNING = Tuning()

# The kernel counts in ten bits.
MOST_KEY_BLOCKS = 1023


def unsupported(
  x: Float[Array, "b s h d"], block: int, key_blocks: int | None = None
) -> str | None:
  """Why arrays like `x` cannot be pooled and scored here.

  key_blocks: all that are chosen from; those of `x` by default.
  """
  b, s, h, d = x.shape
  if device.platform() != "gpu" or device.compute_capability() < (8, 0):
    return "it needs an NVIDIA GPU of compute capability 8.0 or newer."
  if isinstance(triton._modules(), str):
    return f"jax-triton cannot be imported ({triton._modules()}); pip install 'hfjax[cuda]'."
  if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
    return f"the arrays are {x.dtype}; it takes bfloat16, float16 and float32."
  for name, size in (("d", d), ("the block", block)):
    if size < 16 or size > 256 or size & (size - 1):
      return f"{name} is {size}; it takes 16, 32, 64, 128 and 256."
  if not (b and s and h):
    return "an array is empty."
  n = num_blocks(s, block) if key_blocks is None else key_blocks
  if n > MOST_KEY_BLOCKS:
    return f"there are {n} key blocks; it takes up to {MOST_KEY_BLOCKS}."
  # Within one sample and head offsets are numbered in 32 bits.
  if 256 * h * d >= 2**31 or max(b, h, 2 * num_blocks(s, block)) >= 2**16:
    return f"{b} samples of {s} tokens of {h} x {d} numbers are too many."
  return None


def block_means(
  xs: tuple[Float[Array, "b _ h d"], ...], block: int = 64
) -> tuple[Float[Array, "b h _ d"], ...]:
  """Mean of each block of each array, one launch for two arrays; the last block may be ragged.

  The arrays agree in batch, heads, head dimension and dtype. Summed in float32, rounded to their
  dtype. Raises ValueError if they do not fit together.
  """
  b, _, h, d = xs[0].shape
  if any((x.shape[0], *x.shape[2:], x.dtype) != (b, h, d, xs[0].dtype) for x in xs):
    raise ValueError(
      f"The arrays are {', '.join(f'{x.dtype} {x.shape}' for x in xs)}; batch, heads, head "
      "dimension and dtype must agree."
    )
  means: list[jax.Array] = []
  for i in range(0, len(xs), 2):
    pair = tuple(jax.lax.stop_gradient(x) for x in xs[i : i + 2])
    blocks = [num_blocks(x.shape[1], block) for x in pair]
    like = [jax.ShapeDtypeStruct((b, h, n, d), xs[0].dtype) for n in blocks]
    constants: dict[str, Any] = {
      "FIRST": pair[0].shape[1],
      "SECOND": pair[1].shape[1] if len(pair) == 2 else 0,
      "HEADS": h,
      "DIM": d,
      "BLOCK": block,
    }
    if len(pair) == 1:
      constants |= {"second_means": None}
    warps = TUNING.mean_warps * block * d * pair[0].dtype.itemsize // (64 * 128 * 2)
    means += triton.call(
      triton.Launch(
        "block_means",
        (h, sum(blocks), b),
        (pair[0], pair[-1]),
        tuple(like),
        constants,
        min(max(warps, 1), 16),
        1,
        "triton_map_kernels",
      )
    )
  return tuple(means)


def choose_blocks(
  q_means: Float[Array, "b h q d"],
  k_means: Float[Array, "b h n d"],
  most: int,
  count: Int[Array, "b"],
  past_means: Float[Array, "b h p d"] | None = None,
  past_blocks: Int[Array, "b"] | None = None,
) -> Int[Array, "b h q k"]:
  """Lists the key blocks that score best for each query block, int32, in ascending order.

  most: length of the lists (static). count: listed blocks that count, from 1 to `most`; the last of
    them is repeated behind.
  past_means: blocks 0 to p - 1; those of `k_means` follow.
  past_blocks: past blocks that hold a valid token, all by default; others are never among the first
    `count`, as long as `count` does not exceed the number of valid blocks.

  Equal scores go to the lower block number; NaN is above all numbers.
  Raises ValueError if `most` exceeds the number of key blocks, or if these are too many.
  """
  b, h, nq, d = q_means.shape
  n = k_means.shape[2]
  p = 0 if past_means is None else past_means.shape[2]
  if not 1 <= most <= p + n:
    raise ValueError(f"{most} key blocks were to be kept out of {p + n}; keep from 1 to {p + n}.")
  if p + n > MOST_KEY_BLOCKS:
    raise ValueError(f"There are {p + n} key blocks; give up to {MOST_KEY_BLOCKS}.")
  if past_means is None:
    past_means, past_blocks = k_means, count
  elif past_blocks is None:
    past_blocks = jnp.full((b,), p, jnp.int32)
  columns = max(16, 1 << (p + n - 1).bit_length())
  rows, size = TUNING.rows, q_means.dtype.itemsize
  # Key means of a step of the product take 32 KiB of shared memory or less, for each step that is
  # in flight. In float32 a step is 16 numbers, which are held in registers.
  depth = max(16, min(TUNING.depth, d, 2**14 // columns if size == 2 else 16))
  stages = TUNING.stages if columns * depth * size <= 2**15 else 2
  (index,) = triton.call(
    triton.Launch(
      "choose_blocks",
      (num_blocks(nq, rows), h, b),
      (
        *(jax.lax.stop_gradient(x) for x in (q_means, k_means, past_means)),
        count.astype(jnp.int32),
        past_blocks.astype(jnp.int32),
      ),
      (jax.ShapeDtypeStruct((b, h, nq, most), jnp.int32),),
      {
        "QUERIES": nq,
        "KEYS": n,
        "PAST": p,
        "HEADS": h,
        "DIM": d,
        "MOST": most,
        "ROWS": rows,
        "COLUMNS": columns,
        "ENTRIES": 1 << (most - 1).bit_length(),
        "DEPTH": depth,
      },
      TUNING.warps,
      stages,
      "triton_map_kernels",
    )
  )
  return index
