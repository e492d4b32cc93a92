"""Block-sparse attention for Hopper GPUs, with Pallas Mosaic GPU: the backward pass.

Two kernels, without atomics, so that the same inputs give the same bits: gradients of queries by
the lists, those of keys and values by the transposed lists. Both compute the probabilities again
from the log-sum-exp (spec section 5).
"""

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
  launch,
  place,
  produce,
  product,
  rows,
  run_warpgroups,
  split_programs,
  tile,
  tiles_product,
  transpose,
)  # fmt: skip
from pallas_kernels.problem import LOG2E, Gradients, Inputs, Problem
from pallas_kernels.transpose import transpose_lists

# Log-sum-exp of rows that see no key: their probabilities come out as zero.
ALONE = float(jnp.finfo(jnp.float32).max)


def backward(
  problem: Problem,
  inputs: Inputs,
  out: Float[Array, "b s h d"],
  lse: Float[Array, "b h s"],
  dout: Float[Array, "b s h d"],
  tuning_q: Tuning = Tuning(),
  tuning_k: Tuning = Tuning(),
) -> Gradients:
  """Cotangents from that of the output."""
  delta = jnp.einsum("bshd,bshd->bhs", out, dout, preferred_element_type=jnp.float32)
  surplus = inputs.index.shape[2] * problem.block_q - lse.shape[2]
  pad = ((0, 0), (0, 0), (0, surplus))
  delta = jnp.pad(delta, pad)
  lse = jnp.pad(jnp.where(jnp.isfinite(lse), lse, ALONE), pad, constant_values=ALONE)
  arrays = {**inputs._asdict(), "dout": dout, "lse": lse, "delta": delta}
  dq = query_gradient(problem, inputs, arrays, tuning_q)
  return Gradients(dq, *key_gradients(problem, inputs, arrays, tuning_k))


def query_gradient(problem: Problem, inputs: Inputs, arrays, tuning: Tuning):
  """Gradient of the queries, by the lists."""
  b, s, h, d = inputs.q.shape
  nq, dtype, block_k = inputs.index.shape[2], inputs.q.dtype, problem.block_k
  wide = problem.block_q // ROWS
  lists, stages = tuning.lists, tuning.stages
  groups, consumers, slots = -(-nq // lists), lists * wide, lists * stages
  c = problem.scale * LOG2E

  def kernel(refs, outputs, scratch):
    batch, head, row_of, is_own = split_programs(lax.axis_index("n"), h, nq, lists)
    keys = Keys(problem, inputs, refs, batch, head)
    streams = [Stream(stages, [scratch[x]], scratch[f"{x}_full"], scratch[f"{x}_free"])
               for x in "kv"]  # fmt: skip

    def consume(wg):
      rank = wg // wide
      row = row_of(rank)
      first = row * problem.block_q + (wg % wide) * ROWS
      span = pl.ds(first, ROWS)
      ready = scratch["ready"].at[wg]
      q_s, g_s, lse_s, delta_s = (scratch[x].at[wg] for x in ("q", "g", "lse", "delta"))
      plgpu.copy_gmem_to_smem(refs["q"].at[batch, span, head], q_s, ready)
      plgpu.copy_gmem_to_smem(refs["dout"].at[batch, span, head], g_s, ready)
      plgpu.copy_gmem_to_smem(refs["lse"].at[batch, head, span], lse_s, ready)
      plgpu.copy_gmem_to_smem(refs["delta"].at[batch, head, span], delta_s, ready)
      plgpu.barrier_wait(ready)
      lse, delta = lse_s[...], delta_s[...]
      total = refs["count"][batch, head, row]
      k_ring, v_ring = streams

      def valid(step):
        return keys.valid(refs["index"][batch, head, row, step])

      def probabilities(s, valid):
        p = jnp.exp2(s * c - columns(lse, s.shape))
        mask = lambda p: jnp.where(place(p.shape, 1) < valid, p, 0.0)
        return lax.cond(valid < block_k, mask, lambda p: p, p)

      def difference(p, dp):
        """Gradient of the scores, from the probabilities and their gradient."""
        return (p * (dp - columns(delta, p.shape))).astype(dtype)

      def begin(step):
        s = tiles_product(q_s, transpose(k_ring.take(rank, step)))
        dp = tiles_product(g_s, transpose(v_ring.take(rank, step)))
        v_ring.free(rank, step)
        return difference(probabilities(s, valid(step)), dp)

      def end(step, dq, ds):
        scratch_p = scratch["p"].at[wg] if problem.interpret else None
        dq = product(problem, dq, ds, k_ring.held(rank, step), scratch_p)
        k_ring.free(rank, step)
        return dq

      def overlapped(step, carry):
        """Products of this step beside the last one of the step before."""
        dq, ds = carry
        counting = valid(step)  # asked for early, as it comes from far
        k, v = k_ring.take(rank, step), v_ring.take(rank, step)

        def products(s_ref, dp_ref, dq_ref):
          dq_ref[...] = dq
          plgpu.wgmma(s_ref, q_s, transpose(k))
          plgpu.wgmma(dp_ref, g_s, transpose(v))
          plgpu.wgmma(dq_ref, ds, k_ring.held(rank, step - 1))
          p = probabilities(plgpu.wgmma_accumulator_load(s_ref, wait_n=2), counting)
          dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=1)
          v_ring.free(rank, step)
          new_ds = difference(p, dp)
          new = plgpu.wgmma_accumulator_load(dq_ref, wait_n=0)
          k_ring.free(rank, step - 1)
          return new, new_ds

        square = plgpu.ACC((ROWS, block_k), jnp.float32)
        return pl.run_scoped(products, square, square, plgpu.ACC((ROWS, d), jnp.float32))

      def all_steps(dq):
        dq, ds = lax.fori_loop(1, total, overlapped, (dq, begin(0)))
        return end(total - 1, dq, ds)

      dq = jnp.zeros((ROWS, d), jnp.float32)
      if problem.interpret:
        dq = lax.fori_loop(0, total, lambda i, dq: end(i, dq, begin(i)), dq)
      else:
        dq = lax.cond(total > 0, all_steps, lambda dq: dq, dq)
      q_s[...] = (dq * problem.scale).astype(dtype)
      plgpu.commit_smem()

      @pl.when(is_own(rank))
      def _():
        plgpu.copy_smem_to_gmem(q_s, outputs["dq"].at[batch, span, head])
        plgpu.wait_smem_to_gmem(0)

    def feed():
      def fetch(number, rank, step, buffers, barrier):
        block = refs["index"][batch, head, row_of(rank), step]
        keys.fetch("kv"[number], block, buffers[0], barrier)

      produce(streams, [refs["count"][batch, head, row_of(r)] for r in range(lists)], fetch)

    run_warpgroups(consumers, consume, feed)

  full = plgpu.Barrier(num_barriers=slots)
  free = plgpu.Barrier(num_arrivals=wide, num_barriers=slots)
  scratch = {
    "q": tile((consumers, ROWS, d), dtype),
    "g": tile((consumers, ROWS, d), dtype),
    "lse": plgpu.SMEM((consumers, ROWS), jnp.float32),
    "delta": plgpu.SMEM((consumers, ROWS), jnp.float32),
    "k": tile((slots, block_k, d), dtype),
    "v": tile((slots, block_k, d), dtype),
    "ready": plgpu.Barrier(num_arrivals=4, num_barriers=consumers),
    "k_full": full,
    "v_full": full,
    "k_free": free,
    "v_free": free,
  }
  if problem.interpret:
    scratch["p"] = tile((consumers, ROWS, block_k), dtype)
  out_type = {"dq": jax.ShapeDtypeStruct((b, s, h, d), dtype)}
  return launch(problem, kernel, arrays, out_type, b * h * groups, consumers, scratch)["dq"]


def key_gradients(problem: Problem, inputs: Inputs, arrays, tuning: Tuning):
  """Gradients of keys and values, current and past, by the transposed lists."""
  b, _, h, d = inputs.q.shape
  dtype, block_k = inputs.q.dtype, problem.block_k
  blocks, older = inputs.key_blocks(block_k), inputs.past_blocks(block_k)
  queries, counts = transpose_lists(inputs.index, inputs.count, blocks)
  arrays = {**arrays, "queries": queries, "counts": counts}
  # Blocks that get gradients: all, or those of the current buffer.
  skipped = 0 if problem.past_gradient else older
  tall = block_k // ROWS  # consumers of a key block
  parts = problem.block_q // ROWS  # tiles of a query block
  lists, stages = tuning.lists, tuning.stages
  served = blocks - skipped
  groups, consumers, slots = -(-served // lists), lists * tall, lists * stages
  c = problem.scale * LOG2E

  def kernel(refs, outputs, scratch):
    batch, head, served_of, is_own = split_programs(lax.axis_index("n"), h, served, lists)
    keys = Keys(problem, inputs, refs, batch, head)
    stream_q = Stream(stages, [scratch["q"], scratch["lse"]], scratch["q_full"], scratch["q_free"])
    stream_g = Stream(
      stages, [scratch["g"], scratch["delta"]], scratch["g_full"], scratch["g_free"]
    )

    def block_of(rank):
      return served_of(rank) + skipped

    def steps(rank):
      return refs["counts"][batch, head, block_of(rank)] * parts

    def consume(wg):
      rank, at = wg // tall, (wg % tall) * ROWS
      block = block_of(rank)
      k_s, v_s, ready = (scratch[x].at[wg] for x in ("k", "v", "ready"))

      def load(prefix, span):
        span = pl.ds(span.start + at, ROWS)
        plgpu.copy_gmem_to_smem(refs[prefix + "k"].at[batch, span, head], k_s, ready)
        plgpu.copy_gmem_to_smem(refs[prefix + "v"].at[batch, span, head], v_s, ready)

      keys.each_buffer(block, load)
      plgpu.barrier_wait(ready)
      scratch_p = scratch["p"].at[wg] if problem.interpret else None

      def one(step, carry):
        dk, dv = carry
        q, lse_s = stream_q.take(rank, step)
        g, delta_s = stream_g.take(rank, step)
        if problem.interpret:
          s = tiles_product(k_s, transpose(q))
          p = jnp.exp2(s * c - rows(lse_s[...], s.shape))
          dv = product(problem, dv, p.astype(dtype), g, scratch_p)
          dp = tiles_product(v_s, transpose(g))
          ds = (p * (dp - rows(delta_s[...], s.shape))).astype(dtype)
          dk = product(problem, dk, ds, q, scratch_p)
        else:

          def products(s_ref, dp_ref, dv_ref):
            dv_ref[...] = dv
            plgpu.wgmma(s_ref, k_s, transpose(q))
            plgpu.wgmma(dp_ref, v_s, transpose(g))
            s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
            p = jnp.exp2(s * c - rows(lse_s[...], s.shape))
            plgpu.wgmma(dv_ref, p.astype(dtype), g)
            dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=1)
            ds = (p * (dp - rows(delta_s[...], s.shape))).astype(dtype)
            return plgpu.wgmma_accumulator_load(dv_ref, wait_n=0), ds

          square = plgpu.ACC((ROWS, ROWS), jnp.float32)
          dv, ds = pl.run_scoped(products, square, square, plgpu.ACC((ROWS, d), jnp.float32))
          dk = product(problem, dk, ds, q)
        stream_g.free(rank, step)
        stream_q.free(rank, step)
        return dk, dv

      zeros = jnp.zeros((ROWS, d), jnp.float32)
      dk, dv = lax.fori_loop(0, steps(rank), one, (zeros, zeros))
      # A key that does not count has gradients of its own alone, so they are dropped here.
      counts = place((ROWS, d), 0) < keys.valid(block) - at
      k_s[...] = jnp.where(counts, dk * problem.scale, 0.0).astype(dtype)
      v_s[...] = jnp.where(counts, dv, 0.0).astype(dtype)
      plgpu.commit_smem()

      def store(prefix, span):
        span = pl.ds(span.start + at, ROWS)
        for name, source in (("dk", k_s), ("dv", v_s)):
          plgpu.copy_smem_to_gmem(source, outputs[prefix + name].at[batch, span, head])
        plgpu.wait_smem_to_gmem(0)

      @pl.when(is_own(rank))
      def _():
        if skipped:
          store("", pl.ds((block - older) * block_k, block_k))
        else:
          keys.each_buffer(block, store)

    def feed():
      def fetch(number, rank, step, buffers, barrier):
        block = refs["queries"][batch, head, block_of(rank), step // parts]
        span = pl.ds(block * problem.block_q + (step % parts) * ROWS, ROWS)
        tokens, numbers = (("q", "lse"), ("dout", "delta"))[number]
        plgpu.copy_gmem_to_smem(refs[tokens].at[batch, span, head], buffers[0], barrier)
        plgpu.copy_gmem_to_smem(refs[numbers].at[batch, head, span], buffers[1], barrier)

      produce([stream_q, stream_g], [steps(r) for r in range(lists)], fetch)

    run_warpgroups(consumers, consume, feed)

  full = plgpu.Barrier(num_arrivals=2, num_barriers=slots)
  free = plgpu.Barrier(num_arrivals=tall, num_barriers=slots)
  scratch = {
    "k": tile((consumers, ROWS, d), dtype),
    "v": tile((consumers, ROWS, d), dtype),
    "q": tile((slots, ROWS, d), dtype),
    "g": tile((slots, ROWS, d), dtype),
    "lse": plgpu.SMEM((slots, ROWS), jnp.float32),
    "delta": plgpu.SMEM((slots, ROWS), jnp.float32),
    "ready": plgpu.Barrier(num_arrivals=2, num_barriers=consumers),
    "q_full": full,
    "g_full": full,
    "q_free": free,
    "g_free": free,
  }
  if problem.interpret:
    scratch["p"] = tile((consumers, ROWS, ROWS), dtype)
  like = lambda x: jax.ShapeDtypeStruct(x.shape, dtype)
  out_type = {"dk": like(inputs.k), "dv": like(inputs.v)}
  if older and not skipped:
    out_type |= {"past_dk": like(inputs.past_k), "past_dv": like(inputs.past_v)}
  got = launch(problem, kernel, arrays, out_type, b * h * groups, consumers, scratch)
  past = [None if x is None else jnp.zeros_like(x) for x in (inputs.past_k, inputs.past_v)]
  return got["dk"], got["dv"], got.get("past_dk", past[0]), got.get("past_dv", past[1])
