"""Block-sparse attention for Hopper GPUs, with Pallas Mosaic GPU: what it takes, and its tuning."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import device
from pallas_kernels import mosaic_gpu_backward as backward_kernels
from pallas_kernels import mosaic_gpu_forward as forward_kernel
from pallas_kernels.mosaic_gpu_rings import ROWS, Tuning
from pallas_kernels.problem import Gradients, Inputs, Problem

# By block_q and block_k: the fastest on an H200 of what fits its shared memory with heads of 128
# (benchmarks/kernels.md). Of forward, gradients of queries, gradients of keys and values.
TUNING = {
  (64, 64): (Tuning(), Tuning(), Tuning()),
  (64, 128): (Tuning(lists=1), Tuning(lists=1), Tuning(lists=1)),
  (128, 64): (Tuning(lists=1, width=2), Tuning(lists=1), Tuning()),
  (128, 128): (Tuning(lists=1), Tuning(lists=1), Tuning(lists=1)),
}
DTYPES = (jnp.bfloat16, jnp.float16)
HEAD_DIMS = (64, 128)


def unsupported(problem: Problem, inputs: Inputs) -> str | None:
  """Why this backend cannot take a call, or None."""
  if not problem.interpret and device.compute_capability()[0] != 9:
    return "it needs an NVIDIA GPU of compute capability 9 (Hopper)."
  if inputs.q.dtype not in DTYPES:
    return f"the arrays are {inputs.q.dtype}; it takes bfloat16 and float16."
  if inputs.q.shape[3] not in HEAD_DIMS:
    return f"the head dimension is {inputs.q.shape[3]}; it takes 64 and 128."
  if (problem.block_q, problem.block_k) not in TUNING:
    return f"blocks are {problem.block_q} x {problem.block_k}; it takes 64 and 128 rows and keys."
  if not problem.scale > 0:
    return f"the scale is {problem.scale}; it takes positive ones."
  return None


def _lengthen(x: Any, tokens: int) -> Any:
  """At least so many tokens, and a multiple of 8: what else there is cannot be copied by tiles."""
  if x is None:
    return x
  tokens = max(tokens, -(-x.shape[1] // 8) * 8)
  if x.shape[1] == tokens:
    return x
  return jnp.pad(x, ((0, 0), (0, tokens - x.shape[1]), (0, 0), (0, 0)))


def _lengthen_all(problem: Problem, inputs: Inputs) -> Inputs:
  q, *keys = inputs[:5]
  return Inputs._make(
    [_lengthen(q, ROWS), *(_lengthen(x, problem.block_k) for x in keys), *inputs[5:]]
  )


def forward(
  problem: Problem, inputs: Inputs
) -> tuple[Float[Array, "b s h d"], Float[Array, "b h s"]]:
  """Attention in the dtype of `q`, and base-2 log-sum-exp of the scores (-inf without keys)."""
  s = inputs.q.shape[1]
  tuning = TUNING[problem.block_q, problem.block_k][0]
  out, lse = forward_kernel.forward(problem, _lengthen_all(problem, inputs), tuning)
  return out[:, :s], lse[:, :, :s]


def backward(
  problem: Problem,
  inputs: Inputs,
  out: Float[Array, "b s h d"],
  lse: Float[Array, "b h s"],
  dout: Float[Array, "b s h d"],
) -> Gradients:
  """Cotangents from that of the output."""
  s = inputs.q.shape[1]
  out, dout = (_lengthen(x, ROWS) for x in (out, dout))
  rows = ((0, 0), (0, 0), (0, out.shape[1] - s))
  lse = jnp.pad(lse, rows, constant_values=-jnp.inf)
  _, queries, keys = TUNING[problem.block_q, problem.block_k]
  got = backward_kernels.backward(
    problem, _lengthen_all(problem, inputs), out, lse, dout, queries, keys
  )
  cut: Any = lambda x, y: None if y is None else x[:, : y.shape[1]]
  return Gradients(*(cut(x, y) for x, y in zip(got, inputs[:5], strict=True)))
