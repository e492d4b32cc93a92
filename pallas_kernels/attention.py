"""The public function: checks its arguments, chooses a backend, and carries gradients."""

import dataclasses
import functools
import logging
import math
import numbers
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import device, mosaic_gpu, tpu, triton, xla
from pallas_kernels.batching import axes_of, fold_batch, vary
from pallas_kernels.pooling import num_blocks
from pallas_kernels.problem import Gradients, Inputs, Problem

# Each is a module with `unsupported`, `forward` and `backward`, the fastest first: "auto" takes the
# first that can serve a call (figures: benchmarks/kernels.md).
BACKENDS: dict[str, ModuleType] = {
  "mosaic_gpu": mosaic_gpu,
  "triton": triton,
  "tpu": tpu,
  "xla": xla,
}

log = logging.getLogger(__name__)


def block_sparse_attention(
  q: Float[Array, "b s h d"],
  k: Float[Array, "b s h d"],
  v: Float[Array, "b s h d"],
  block_index: Int[Array, "b h q k"],
  block_count: Int[Array, "b h q"] | None = None,
  *,
  scale: float | None = None,
  length: Int[Array, "b"] | None = None,
  past_k: Float[Array, "b s h d"] | None = None,
  past_v: Float[Array, "b s h d"] | None = None,
  past_length: Int[Array, "b"] | None = None,
  past_gradient: bool = True,
  block_q: int = 64,
  block_k: int = 64,
  backend: str = "auto",
) -> Float[Array, "b s h d"]:
  """Softmax attention of each query block to its listed key blocks only (spec section 5).

  Queries and keys may have any length; the last block of either may be ragged. Products are summed
  and the softmax is taken in float32.

  block_index: key blocks of each query block. With past keys, blocks 0 to ceil(capacity /
    block_k) - 1 are those of the past buffer, whatever its valid length; current ones follow.
    The entries that count must be distinct blocks that there are; the others may be any numbers.
  block_count: how many entries count, from the front; broadcastable to `[b h q]`; all by default.
  scale: factor of the scores, a number that is known when the call is compiled; d^-1/2 by default.
  length, past_length: valid tokens at the front of `k` and of `past_k`; all by default, no more.
    What lies behind them must be finite. A row whose listed blocks hold no valid key comes out as
    zero.
  past_gradient: False where past keys and values are constants, so that the backward pass need not
    compute their gradients; they are zero then.
  backend: a name in `BACKENDS`, or "auto" for the fastest that this device and these sizes allow.

  Differentiable in q, k, v, past_k and past_v, once and in reverse. Under `jax.vmap` the mapped
  axis joins the batch. Arrays that are sharded over axes of a mesh that jax knows by type
  (`AxisType.Explicit`) are to come through `jax.shard_map`.

  Returns the dtype of `q`. Raises ValueError on shapes that do not fit together, and if a backend
  that is asked for by name cannot serve the call.
  """
  if scale is not None and not (isinstance(scale, numbers.Real) and math.isfinite(scale)):
    raise ValueError(f"The scale is {scale}; give a finite number, not an array.")
  inputs = _check(
    q, k, v, block_index, block_count, length, past_k, past_v, past_length, block_q, block_k
  )
  problem = Problem(
    float(q.shape[-1] ** -0.5 if scale is None else scale), block_q, block_k, backend, past_gradient
  )
  return _compiled(choose_backend(problem, inputs), inputs)


def choose_backend(problem: Problem, inputs: Inputs) -> Problem:
  """The problem with the name of the backend that serves it.

  Raises ValueError if the one that is asked for is unknown or cannot.
  """
  if problem.backend != "auto":
    if problem.backend not in BACKENDS:
      raise ValueError(
        f"Unknown backend {problem.backend!r}; choose auto or one of {', '.join(BACKENDS)}."
      )
    why = BACKENDS[problem.backend].unsupported(problem, inputs)
    if why is not None:
      raise ValueError(f"The backend {problem.backend} cannot serve this call: {why}")
    return problem
  reasons = []
  for name, module in BACKENDS.items():
    why = module.unsupported(problem, inputs)
    if why is None:
      break
    reasons.append(f"{name}: {why}")
  if reasons and device.platform() != "cpu":
    # Plain JAX is a disappointment there; another kernel is as it should be.
    level = logging.WARNING if name == "xla" else logging.INFO
    _say(level, f"Block-sparse attention runs on the backend {name} ({' '.join(reasons)})")
  return dataclasses.replace(problem, backend=name)


@functools.cache
def _say(level: int, line: str):
  log.log(level, line)  # once for each reason


def attend(problem: Problem, inputs: Inputs) -> Float[Array, "b s h d"]:
  """Attention of checked inputs on the problem's backend."""
  # Cast here, so that what all shards share gets the sum of their gradients.
  return _attend(problem, vary(axes_of(inputs), inputs))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(problem: Problem, inputs: Inputs) -> Float[Array, "b s h d"]:
  return forward(problem, inputs)[0]


def forward(
  problem: Problem, inputs: Inputs
) -> tuple[Float[Array, "b s h d"], Float[Array, "b h s"]]:
  """Attention, and base-2 log-sum-exp of the scores; -inf for a row without keys."""
  return fold_batch(functools.partial(BACKENDS[problem.backend].forward, problem))(inputs)


def backward(problem: Problem, inputs: Inputs, *rest: jax.Array) -> Gradients:
  """Cotangents of the inputs; rest: output, log-sum-exp, cotangent of the output."""
  return fold_batch(functools.partial(BACKENDS[problem.backend].backward, problem))(inputs, *rest)


def _attend_fwd(problem, inputs):
  out, lse = forward(problem, inputs)
  return out, (inputs, out, lse)


def _attend_bwd(problem, saved, dout):
  inputs, out, lse = saved
  got = _compiled_backward(problem, inputs, out, lse, dout)
  nothing: Any = (None,) * (len(inputs) - len(got))  # numbers carry no gradient
  return (Inputs(*got, *nothing),)


_attend.defvjp(_attend_fwd, _attend_bwd)

# Outside of jit too a call is compiled once for its shapes, not whenever it is made.
_compiled = jax.jit(attend, static_argnums=0, inline=True)
_compiled_backward = jax.jit(backward, static_argnums=0, inline=True)


def _check(q, k, v, index, count, length, past_k, past_v, past_length, block_q, block_k) -> Inputs:
  """The arrays with defaults filled in; ValueError if they do not fit together."""
  if q.ndim != 4:
    raise ValueError(f"q has shape {q.shape}; give [batch, length, heads, dim].")
  if not all(isinstance(n, int) and n > 0 for n in (block_q, block_k)):
    raise ValueError(
      f"Blocks are {block_q!r} queries and {block_k!r} keys; give whole numbers, at least 1 each."
    )
  if not jnp.issubdtype(q.dtype, jnp.floating):
    raise ValueError(f"q is {q.dtype}; give floating point numbers.")
  b, s, h, d = q.shape
  if (past_k is None) != (past_v is None) or (past_length is not None and past_k is None):
    raise ValueError("Past keys, values and their length go together; give past_k and past_v.")
  buffers: list[tuple[str, Any]] = [("k", k), ("v", v)]
  if past_k is not None:
    buffers += [("past_k", past_k), ("past_v", past_v)]
  for name, x in buffers:
    if x.ndim != 4 or (x.shape[0], *x.shape[2:]) != (b, h, d):
      raise ValueError(
        f"q has shape {q.shape} and {name} {x.shape}; batch, heads and head dimension "
        "must agree ([batch, length, heads, dim])."
      )
    if x.dtype != q.dtype:
      raise ValueError(f"q is {q.dtype} and {name} {x.dtype}; give all in one dtype.")
  for (name, x), (other, y) in zip(buffers[::2], buffers[1::2], strict=True):
    if x.shape[1] != y.shape[1]:
      raise ValueError(
        f"{name} holds {x.shape[1]} tokens and {other} {y.shape[1]}; they must be equal."
      )
  if not (q.size and k.size):
    raise ValueError(f"q has shape {q.shape} and k {k.shape}; no axis may be empty.")
  if past_k is not None and not past_k.size:  # no room, and so no blocks
    past_k = past_v = past_length = None
  index = jnp.asarray(index)
  want = (b, h, num_blocks(s, block_q))
  if index.ndim != 4 or index.shape[:3] != want:
    raise ValueError(
      f"block_index has shape {index.shape}; {s} queries in blocks of {block_q} need {want} lists."
    )
  if not jnp.issubdtype(index.dtype, jnp.integer) or not index.shape[3]:
    raise ValueError(
      f"block_index is {index.dtype} {list(index.shape)}; give integers, one or more in a list."
    )
  lengths: list[Any] = []
  for name, n, buffer in (("length", length, k), ("past_length", past_length, past_k)):
    if buffer is None:
      lengths.append(None)
      continue
    n = jnp.full((b,), buffer.shape[1], jnp.int32) if n is None else jnp.asarray(n)
    if n.shape != (b,) or not jnp.issubdtype(n.dtype, jnp.integer):
      raise ValueError(f"{name} is {n.dtype} {list(n.shape)}; give integers of shape [{b}].")
    # What lies beyond the buffer is padding to some backends.
    lengths.append(jnp.clip(n, 0, buffer.shape[1]).astype(jnp.int32))
  count = jnp.asarray(index.shape[3] if count is None else count)
  if not jnp.issubdtype(count.dtype, jnp.integer):
    raise ValueError(f"block_count is {count.dtype}; give integers.")
  try:
    count = jnp.broadcast_to(count, want).astype(jnp.int32)
  except ValueError as e:
    raise ValueError(
      f"block_count has shape {list(jnp.shape(count))}; give one that broadcasts to {want}."
    ) from e
  inputs = Inputs(q, k, v, past_k, past_v, jnp.asarray(index, jnp.int32), count, *lengths)
  blocks = inputs.key_blocks(block_k)
  if index.shape[3] > blocks:
    raise ValueError(
      f"block_index lists {index.shape[3]} blocks of keys, and there are only {blocks}."
    )
  # A count beyond the list would read its neighbour's.
  return inputs._replace(count=jnp.clip(count, 0, index.shape[3]))
