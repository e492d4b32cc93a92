"""Block-sparse attention for Hopper GPUs, with Pallas Mosaic GPU: the forward pass.

The tensor cores multiply the keys of a block while they multiply the values of the one before, and
the softmax runs in between, in base 2.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.mosaic_gpu_rings import (
  ROWS,
  Keys,
  Stream,
  Tuning,
  columns,
  halved,
  launch,
  place,
  produce,
  product,
  run_warpgroups,
  split_half,
  split_programs,
  tile,
  tiles_product,
  transpose,
)  # fmt: skip
from pallas_kernels.problem import LOG2E, Inputs, Problem

# Below every score, and finite, so that differences of it are no NaN.
NEVER = float(jnp.finfo(jnp.float32).min)


def forward(
  problem: Problem, inputs: Inputs, tuning: Tuning
) -> tuple[Float[Array, "b s h d"], Float[Array, "b h s"]]:
  """Attention in the dtype of `q`, and base-2 log-sum-exp of the scores (-inf without keys)."""
  b, s, h, d = inputs.q.shape
  nq, dtype, block_k = inputs.index.shape[2], inputs.q.dtype, problem.block_k
  wide = problem.block_q // ROWS  # consumers of a query block
  lists, stages, width = tuning.lists, tuning.stages, tuning.width
  consumers, slots = lists * wide, lists * stages
  programs = b * h * -(-nq // lists)
  halves = halved(programs, consumers)
  c = problem.scale * LOG2E

  def kernel(refs, outputs, scratch):
    work, takes_part = split_half(programs, halves)
    batch, head, row_of, is_own = split_programs(work, h, nq, lists)
    keys = Keys(problem, inputs, refs, batch, head)
    streams = [Stream(stages, [scratch[x]], scratch[f"{x}_full"], scratch[f"{x}_free"])
               for x in "kv"]  # fmt: skip

    def count_of(rank):
      return refs["count"][batch, head, row_of(rank)]

    def steps(count):
      """At least one: of an empty list, all keys of its first block are masked."""
      return jnp.maximum((count + width - 1) // width, 1)

    def block_of(rank, count, step, part):
      """A listed block of a step; the last one again where the list is at its end."""
      entry = jnp.minimum(step * width + part, jnp.maximum(count - 1, 0))
      # What an empty list holds may be no block at all.
      return lax.select(count > 0, refs["index"][batch, head, row_of(rank), entry], 0)

    def consume(wg):
      rank = wg // wide
      row = row_of(rank)
      rows = pl.ds(row * problem.block_q + (wg % wide) * ROWS, ROWS)
      q_s, lse_s, ready = (scratch[x].at[wg] for x in ("q", "lse", "ready"))
      plgpu.copy_gmem_to_smem(refs["q"].at[batch, rows, head], q_s, ready)
      plgpu.barrier_wait(ready)
      count = count_of(rank)
      total = steps(count)
      k_ring, v_ring = streams

      def valid(step):
        """Keys that count of each of a step's blocks."""
        return [
          lax.select(step * width + part < count, keys.valid(block_of(rank, count, step, part)), 0)
          for part in range(width)
        ]

      def masked(s, valid):
        def mask(s):
          column = place(s.shape, 1)
          counts = column < valid[0]
          for part in range(1, width):
            at = part * block_k
            counts = jnp.where(column < at, counts, column < valid[part] + at)
          return jnp.where(counts, s, -jnp.inf)

        least = functools.reduce(jnp.minimum, valid)
        return lax.cond(least < block_k, mask, lambda s: s, s)

      def soften(s, m, norm):
        """Probabilities, new maximum, factor of what was summed before, and new sum."""
        new = jnp.maximum(m, s.max(axis=1) * c)
        factor = jnp.exp2(m - new)
        p = jnp.exp2(s * c - columns(new, s.shape))
        return p.astype(dtype), new, factor, norm * factor + p.sum(axis=1)

      def begin(step, m, norm):
        s = tiles_product(q_s, transpose(k_ring.take(rank, step)))
        k_ring.free(rank, step)
        return soften(masked(s, valid(step)), m, norm)

      def end(step, acc, p):
        scratch_p = scratch["p"].at[wg] if problem.interpret else None
        acc = product(problem, acc, p, v_ring.take(rank, step), scratch_p)
        v_ring.free(rank, step)
        return acc

      def one(step, carry):
        acc, m, norm = carry
        p, m, factor, norm = begin(step, m, norm)
        return end(step, acc * columns(factor, acc.shape), p), m, norm

      def overlapped(step, carry):
        """Keys of this step beside the values of the one before, whose probabilities are p."""
        acc, m, norm, p = carry
        counting = valid(step)  # asked for early, as it comes from far
        k = k_ring.take(rank, step)

        def products(s_ref, acc_ref):
          acc_ref[...] = acc
          plgpu.wgmma(s_ref, q_s, transpose(k))
          plgpu.wgmma(acc_ref, p, v_ring.take(rank, step - 1))
          s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
          k_ring.free(rank, step)
          p_new, m_new, factor, l_new = soften(masked(s, counting), m, norm)
          new = plgpu.wgmma_accumulator_load(acc_ref, wait_n=0)
          v_ring.free(rank, step - 1)
          return new * columns(factor, new.shape), m_new, l_new, p_new

        accs = (plgpu.ACC((ROWS, n), jnp.float32) for n in (width * block_k, d))
        return pl.run_scoped(products, *accs)

      acc = jnp.zeros((ROWS, d), jnp.float32)
      m = jnp.full((ROWS,), NEVER, jnp.float32)
      norm = jnp.zeros((ROWS,), jnp.float32)
      if problem.interpret:
        acc, m, norm = lax.fori_loop(0, total, one, (acc, m, norm))
      else:
        p, m, _, norm = begin(0, m, norm)
        acc, m, norm, p = lax.fori_loop(1, total, overlapped, (acc, m, norm, p))
        acc = end(total - 1, acc, p)
      q_s[...] = (acc * columns(jnp.where(norm > 0, 1 / norm, 0.0), acc.shape)).astype(dtype)
      lse_s[...] = jnp.where(norm > 0, m + jnp.log(norm) * LOG2E, -jnp.inf)
      plgpu.commit_smem()

      @pl.when(is_own(rank))
      def store():
        plgpu.copy_smem_to_gmem(q_s, outputs["out"].at[batch, rows, head])
        plgpu.copy_smem_to_gmem(lse_s, outputs["lse"].at[batch, head, rows])
        plgpu.wait_smem_to_gmem(0)

    def skip(wg):
      """Empties the ring that this consumer shares with the one that works, if it shares one."""
      if wide > 1:

        @pl.loop(0, steps(count_of(wg // wide)))
        def _(step):
          for stream in streams:
            stream.take(wg // wide, step)
            stream.free(wg // wide, step)

    def consume_part(wg):
      pl.when(takes_part(wg))(functools.partial(consume, wg))
      if halves:
        pl.when(~takes_part(wg))(functools.partial(skip, wg))

    def feed():
      counts = [count_of(r) for r in range(lists)]  # read once, as they come from far
      totals = [steps(count) for count in counts]
      if wide == 1:
        totals = [lax.select(takes_part(r), total, 0) for r, total in enumerate(totals)]

      def fetch(number, rank, step, buffers, barrier):
        for part in range(width):
          target = buffers[0].at[pl.ds(part * block_k, block_k)]
          block = block_of(rank, counts[rank], step, part)
          keys.fetch("kv"[number], block, target, barrier)

      produce(streams, totals, fetch)

    run_warpgroups(consumers, consume_part, feed)

  full = plgpu.Barrier(num_arrivals=width, num_barriers=slots)
  free = plgpu.Barrier(num_arrivals=wide, num_barriers=slots)
  scratch = {
    "q": tile((consumers, ROWS, d), dtype),
    "lse": plgpu.SMEM((consumers, ROWS), jnp.float32),
    "k": tile((slots, width * block_k, d), dtype),
    "v": tile((slots, width * block_k, d), dtype),
    "ready": plgpu.Barrier(num_barriers=consumers),
    "k_full": full,
    "v_full": full,
    "k_free": free,
    "v_free": free,
  }
  if problem.interpret:
    scratch["p"] = tile((consumers, ROWS, width * block_k), dtype)
  out_type = {
    "out": jax.ShapeDtypeStruct((b, s, h, d), dtype),
    "lse": jax.ShapeDtypeStruct((b, h, nq * problem.block_q), jnp.float32),
  }
  got = launch(problem, kernel, inputs._asdict(), out_type, programs + halves, consumers, scratch)
  return got["out"], got["lse"][:, :, :s]
