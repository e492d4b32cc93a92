"""Block-sparse attention in Triton, called through jax-triton: NVIDIA GPUs from Ampere on.

What runs on the GPU is in `triton_kernels`; here are sizes, grids and tuning.
"""

import functools
import math
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.pooling import num_blocks
from pallas_kernels.problem import Gradients, Inputs, Problem
from pallas_kernels.transpose import transpose_lists


class Tuning(NamedTuple):
  """How a kernel is compiled.

  tile_q, tile_k: rows of a tile of queries and of keys, powers of two; a block is cut into tiles.
  warps, stages: `num_warps` and `num_stages` of Triton.
  branch: masks are computed where a key does not count, else everywhere (forward, queries).
  fused: the kernel makes the row statistics, else XLA does (queries).
  turned: scores have keys as rows (keys).
  """

  tile_q: int
  tile_k: int
  warps: int = 4
  stages: int = 2
  branch: bool = True
  fused: bool = False
  turned: bool = False


# By kernel, block_q, block_k and head dimension, for two-byte numbers on Hopper; `_default` serves
# the rest. It is read when a call is traced.
TUNING: dict[tuple[str, int, int, int], Tuning] = {
  ("forward", 64, 64, 128): Tuning(64, 64, stages=3),
  ("queries", 64, 64, 128): Tuning(64, 64),
  ("keys", 64, 64, 128): Tuning(64, 64),
  ("forward", 128, 64, 128): Tuning(128, 64, warps=8, stages=3),
  ("queries", 128, 64, 128): Tuning(128, 64, warps=8),
  ("keys", 128, 64, 128): Tuning(64, 64),
}

# Shared memory of a thread block in KiB, by compute capability.
_SHARED = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
_SHARED_ELSEWHERE = 99


class Launch(NamedTuple):
  """One call of a kernel.

  kernel: its name in `module`. arrays, outputs: its first parameters, in order.
  constants: its other parameters, by name. warps, stages: `num_warps` and `num_stages` of Triton.
  """

  kernel: str
  grid: tuple[int, int, int]
  arrays: tuple[jax.Array, ...]
  outputs: tuple[jax.ShapeDtypeStruct, ...]
  constants: dict[str, Any]
  warps: int
  stages: int
  module: str = "triton_kernels"


def unsupported(problem: Problem, inputs: Inputs) -> str | None:
  """Why this backend cannot take a call."""
  b, _, h, d = inputs.q.shape
  if problem.interpret:
    return "it has no interpreter."
  if jax.default_backend() != "gpu" or _capability() < (8, 0):
    return "it needs an NVIDIA GPU of compute capability 8.0 or newer."
  if isinstance(_modules(), str):
    return f"jax-triton cannot be imported ({_modules()}); pip install 'hfjax[cuda]'."
  if inputs.q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
    return f"the arrays are {inputs.q.dtype}; it takes bfloat16, float16 and float32."
  for name, x in (("d", d), ("block_q", problem.block_q), ("block_k", problem.block_k)):
    if x < 16 or x > 128 or x & (x - 1):
      return f"{name} is {x}; it takes 16, 32, 64 and 128."
  if not (problem.scale > 0 and math.isfinite(problem.scale)):
    return f"the scale is {problem.scale}; it takes positive ones."
  if not all(x.size for x in inputs if x is not None):
    return "an array is empty."
  longest = max(inputs.q.shape[1], inputs.k.shape[1], inputs.capacity)
  # Rows of the last tile, too, are numbered in 32 bits before they are masked.
  if (longest + 128) * h * d >= 2**31 or max(b, h) >= 2**16:
    return f"{b} samples of {longest} tokens of {h} x {d} numbers are too many."
  return None


def forward(
  problem: Problem, inputs: Inputs
) -> tuple[Float[Array, "b s h d"], Float[Array, "b h s"]]:
  """Attention in the dtype of `q`, and base-2 log-sum-exp of the scores (-inf without keys)."""
  b, s, h, _ = inputs.q.shape
  tuning = _tuning("forward", problem, inputs)
  out, lse = call(
    Launch(
      "forward",
      (num_blocks(s, tuning.tile_q), h, b),
      _arrays(inputs),
      (_like(inputs.q), jax.ShapeDtypeStruct((b, h, s), jnp.float32)),
      _constants(problem, inputs, tuning)
      | {"LISTED": inputs.index.shape[3], "BRANCH": tuning.branch},
      tuning.warps,
      tuning.stages,
    )
  )
  return out, lse


def backward(
  problem: Problem,
  inputs: Inputs,
  out: Float[Array, "b s h d"],
  lse: Float[Array, "b h s"],
  dout: Float[Array, "b s h d"],
) -> Gradients:
  """Cotangents from that of the output; scores are computed again (spec section 5).

  No sum depends on the order in which programs run.
  """
  dq, stats = _gradient_of_queries(problem, inputs, out, lse, dout)
  dk, dv, *past = _gradients_of_keys(problem, inputs, stats, dout)
  if not past:
    past = [None if x is None else jnp.zeros_like(x) for x in (inputs.past_k, inputs.past_v)]
  return Gradients(dq, dk, dv, *past)


def call(launch: Launch) -> list[jax.Array]:
  """Outputs of a kernel."""
  modules = _modules()
  if isinstance(modules, str):
    raise ImportError(modules)
  jax_triton, kernels = modules
  return jax_triton.triton_call(
    *launch.arrays,
    kernel=getattr(kernels[launch.module], launch.kernel),
    name=f"block_sparse_{launch.kernel}",
    out_shape=launch.outputs,
    grid=launch.grid,
    num_warps=launch.warps,
    num_stages=launch.stages,
    **launch.constants,
  )


def _gradient_of_queries(problem, inputs, out, lse, dout):
  """Gradient of `q`, and statistics of its rows `[b h s 2]`: log-sum-exp, sum of out * dout."""
  b, s, h, _ = inputs.q.shape
  tuning = _tuning("queries", problem, inputs)
  stats = lse if tuning.fused else _stats(out, lse, dout)
  dq, new_stats = call(
    Launch(
      "gradient_of_queries",
      (num_blocks(s, tuning.tile_q), h, b),
      (*_arrays(inputs), dout, stats, lse, out),
      (_like(inputs.q), jax.ShapeDtypeStruct((b, h, s, 2), jnp.float32)),
      _constants(problem, inputs, tuning)
      | {"LISTED": inputs.index.shape[3], "BRANCH": tuning.branch, "FUSED": tuning.fused},
      tuning.warps,
      tuning.stages,
    )
  )
  return dq, new_stats if tuning.fused else stats


def _stats(out, lse, dout):
  """Statistics of rows for the gradients; +inf stands for the log-sum-exp of a row without keys."""
  delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
  return jnp.stack([jnp.where(jnp.isneginf(lse), jnp.inf, lse), delta], axis=-1)


def _gradients_of_keys(problem, inputs, stats, dout):
  """Gradients of `k` and `v`, and of `past_k` and `past_v` if they are wanted."""
  b, _, h, _ = inputs.q.shape
  tuning = _tuning("keys", problem, inputs)
  blocks = inputs.key_blocks(problem.block_k)
  index, count = transpose_lists(inputs.index, inputs.count, blocks)
  constants = _constants(problem, inputs, tuning)
  constants |= {"BLOCKS": blocks, "SKIPPED": 0, "TURNED": tuning.turned}
  buffers = [inputs.k, inputs.v]
  if inputs.capacity and problem.past_gradient:
    buffers += [inputs.past_k, inputs.past_v]
  else:
    constants |= {"PAST": 0, "SKIPPED": inputs.past_blocks(problem.block_k)}
    constants |= {"past_dk": None, "past_dv": None}
  tiles = sum(num_blocks(x.shape[1], tuning.tile_k) for x in buffers[::2])
  return call(
    Launch(
      "gradients_of_keys",
      (tiles, h, b),
      (*_arrays(inputs._replace(index=index, count=count)), dout, stats),
      tuple(_like(x) for x in buffers),
      constants,
      tuning.warps,
      tuning.stages,
    )
  )


def _arrays(inputs):
  """The arrays of every kernel; where there is no past buffer the current one fills its place."""
  past = inputs.past_k, inputs.past_v, inputs.past_length
  if inputs.past_k is None:
    past = inputs.k, inputs.v, inputs.length
  past_k, past_v, past_length = past
  return (
    inputs.q, inputs.k, inputs.v, past_k, past_v, inputs.index, inputs.count, inputs.length,
    past_length,
  )  # fmt: skip


def _constants(problem, inputs, tuning):
  _, s, h, d = inputs.q.shape
  return {
    "SCALE": problem.scale,
    "QUERIES": s,
    "KEYS": inputs.k.shape[1],
    "PAST": inputs.capacity,
    "HEADS": h,
    "DIM": d,
    "BLOCK_Q": problem.block_q,
    "BLOCK_K": problem.block_k,
    "TILE_Q": tuning.tile_q,
    "TILE_K": tuning.tile_k,
  }


def _like(x):
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _tuning(kernel: str, problem: Problem, inputs: Inputs) -> Tuning:
  """The entry of the table or a guess, made small enough for the shared memory of this GPU."""
  d, size = inputs.q.shape[3], inputs.q.dtype.itemsize
  blocks = problem.block_q, problem.block_k
  hopper = _capability()[0] == 9
  tuning = TUNING.get((kernel, *blocks, d)) if hopper and size == 2 else None
  tuning = tuning or _default(kernel, *blocks, size, hopper)
  limit = 1024 * _SHARED.get(_capability(), _SHARED_ELSEWHERE)
  while _shared_bytes(kernel, tuning, d, size) > limit and tuning.stages > 1:
    tuning = tuning._replace(stages=tuning.stages - 1)
  while _shared_bytes(kernel, tuning, d, size) > limit:
    larger = "tile_q" if tuning.tile_q > tuning.tile_k else "tile_k"
    tuning = tuning._replace(warps=4, **{larger: getattr(tuning, larger) // 2})
  return tuning


def _default(kernel: str, block_q: int, block_k: int, size: int, hopper: bool) -> Tuning:
  if size == 4:
    # Without tensor cores operands are held in registers.
    return Tuning(min(block_q, 32), min(block_k, 32), stages=1)
  if kernel == "keys":
    # The other form spills many registers where there is no Hopper's `wgmma`.
    turned = block_k == 128 or not hopper
    return Tuning(min(block_q, 64), block_k, 8 if block_k == 128 else 4, turned=turned)
  warps = 8 if block_q == 128 else 4
  return Tuning(block_q, min(block_k, 64), warps, stages=3 if kernel == "forward" else 2)


def _shared_bytes(kernel: str, tuning: Tuning, d: int, size: int) -> int:
  """Shared memory that a kernel takes, as Triton 3.6 allots it on Hopper, or somewhat more."""
  q, k, stages = tuning.tile_q, tuning.tile_k, tuning.stages
  if kernel == "keys":
    return size * (2 * d * (k + stages * q) + q * k) + 8 * stages * q
  return size * d * ((q if kernel == "forward" else 2 * q) + 2 * stages * k)


def _capability() -> tuple[int, int]:
  """Compute capability; (0, 0) where it is not NVIDIA's kind of number."""
  major, _, minor = str(getattr(jax.devices()[0], "compute_capability", "")).partition(".")
  return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)


@functools.cache
def _modules() -> tuple[ModuleType, dict[str, ModuleType]] | str:
  """jax-triton and the modules of kernels by name, or why they cannot be imported."""
  try:
    import jax_triton

    from pallas_kernels import triton_kernels, triton_map_kernels
  except Exception as e:  # it imports private modules, which can fail in many ways
    return f"{type(e).__name__}: {e}"
  return jax_triton, {
    "triton_kernels": triton_kernels,
    "triton_map_kernels": triton_map_kernels,
  }
