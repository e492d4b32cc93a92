"""Checks the kernels of block-sparse attention on a GPU: `python tools/check_gpu.py`.

Every backend that this machine can run is held against plain JAX in float32, at the highest
precision, on the same inputs: attention, log-sum-exp and all gradients, on fresh random data. The
lists hold the ragged last blocks, lengths end inside blocks. Each call is repeated, on memory that
was filled with NaN before, and must give the same bits. Then a small model is sampled with each
backend.

Exit status: 0 if all is well, 1 if a check failed, 2 if there is no backend to check.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from kernel_cases import STREAM, Size, available, commit, draw, problem

import pallas_kernels
from hfjax.models import wan
from hfjax.models.geometry import Geometry
from hfjax.models.presets import WanConfig
from hfjax.streaming.config import StreamConfig
from hfjax.streaming.latent_stream import sample_keys
from hfjax.streaming.rollout import generate
from hfjax.streaming.state import init_state
from pallas_kernels import attention, triton_map
from pallas_kernels.problem import Inputs

ALLOWED = {"bfloat16": 1e-2, "float32": 1e-5}  # relative error, by norm
ALLOWED_LSE = 1e-4  # in bits; scores are exact to float32
# Name: size, share of blocks, query rows and keys of a block, valid current and past keys.
CASES: dict[str, tuple[Size, float, int, int, tuple[list[int], list[int]] | None]] = {
  "stream": (STREAM, 0.2, 64, 64, None),
  "ragged": (Size(2, 3, 128, 333, 245, 137), 0.6, 64, 64, ([137, 70], [245, 131])),
  "heads of 64": (Size(1, 4, 64, 250, 0, 700), 0.5, 64, 64, ([650], [0])),
  "no past yet": (Size(2, 2, 128, 130, 192, 130), 1.0, 64, 64, ([130, 130], [0, 192])),
  "tall": (Size(1, 2, 128, 500, 256, 333), 0.4, 128, 64, ([300], [200])),
  "wide": (Size(1, 2, 128, 200, 256, 333), 0.7, 128, 128, ([300], [200])),
  "short": (Size(1, 2, 128, 20, 30, 10), 1.0, 64, 64, None),
}


def error(got: Any, want: Any) -> float:
  """Norm of the difference over the norm, in float64; infinity if anything is not finite."""
  got, want = np.float64(got), np.float64(want)
  if not np.isfinite(got).all():
    return float("inf")
  return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def upcast(tree: Any) -> Any:
  """Floating-point arrays in float32."""
  single = lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
  return jax.tree.map(single, tree)


def poison(like: Any):
  """Fills memory of the sizes of arrays with NaN and frees it, for the next call to be given."""
  filled = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), like)
  jax.block_until_ready(filled)
  jax.tree.map(lambda x: x.delete(), filled)


def run(p, inputs: Inputs, dout, repeats: int) -> tuple[dict[str, Any], bool]:
  """Results by name, and whether all repeats gave the same bits."""

  @jax.jit
  def call(inputs, dout):
    out, lse = attention.forward(p, inputs)
    return out, lse, attention.backward(p, inputs, out, lse, dout)

  first = jax.tree.map(np.asarray, call(inputs, dout))
  same = True
  for _ in range(repeats - 1):
    poison(first)
    again = call(inputs, dout)
    equal = jax.tree.map(lambda x, y: np.array_equal(x, np.asarray(y)), first, again)
    same &= all(jax.tree.leaves(equal))
  out, lse, grads = first
  named = {"out": out, "lse": lse, **{f"d{k}": v for k, v in grads._asdict().items()}}
  return {k: v for k, v in named.items() if v is not None}, same


def check_case(name: str, backend: str, dtype: str, seed: int, repeats: int) -> dict[str, Any]:
  """Errors of one backend on one case."""
  size, ratio, block_q, block_k, valid = CASES[name]
  inputs = draw(size, ratio, block_q, block_k, dtype, seed, valid)
  p = problem(size, backend, block_q, block_k)
  why = attention.BACKENDS[backend].unsupported(p, inputs)
  if why is not None:
    return {"skipped": why}
  dout = jax.random.normal(jax.random.key(seed + 1), inputs.q.shape, dtype)
  plain = dataclasses.replace(p, backend="xla")
  with jax.default_matmul_precision("highest"):
    want, _ = run(plain, upcast(inputs), upcast(dout), 1)
  got, same = run(p, inputs, dout, repeats)
  lse, want_lse = got.pop("lse"), want.pop("lse")
  there = np.isfinite(want_lse)
  errors = {k: error(got[k], want[k]) for k in want}
  off = float(np.abs(np.where(there, lse - want_lse, 0)).max())
  ok = all(e <= ALLOWED[dtype] for e in errors.values()) and off <= ALLOWED_LSE and same
  ok &= bool((np.isneginf(lse) == ~there).all())
  return {"errors": errors, "lse": off, "same_bits": same, "ok": ok}


def check_block_map(seed: int) -> dict[str, Any]:
  """The kernels of the block map against plain JAX, at the streaming size and with less past."""
  x = draw(STREAM, 0.2, seed=seed)
  past = pallas_kernels.block_means(x.past_k)
  states = [0, STREAM.past // 2, STREAM.past]
  worst, kernel = 0.0, triton_map.unsupported(x.q, 64, x.key_blocks(64)) is None
  for state in range(len(states)):
    given = {"past_means": past, "states": states, "state": jnp.array([state])}
    index, count = (np.asarray(y) for y in pallas_kernels.block_map(x.q, x.k, 0.2, **given))
    plain = pallas_kernels.block_map(x.q, x.k, 0.2, backend="xla", **given)[0]
    means = np.concatenate([past, pallas_kernels.block_means(x.k)], axis=2).astype(np.float64)
    queries = np.asarray(pallas_kernels.block_means(x.q)).astype(np.float64)
    scores = np.einsum("bhqd,bhnd->bhqn", queries, means)
    kept = int(count.max())
    # Blocks that score the same to float32 may be exchanged, so the sums of scores are compared.
    sums = [
      np.take_along_axis(scores, np.asarray(i)[..., :kept], axis=-1).sum(-1) for i in (index, plain)
    ]
    distinct = all(len(set(row)) == kept for row in index[..., :kept].reshape(-1, kept))
    off = float(np.abs(sums[0] - sums[1]).max() / np.abs(sums[1]).max())
    worst = max(worst, off if distinct else float("inf"))
  return {"off": worst, "kernel": kernel, "ok": worst <= 1e-5}


def sample(backend: str, dtype: str, chunks: int = 4) -> np.ndarray:
  """Latents of a small hybrid model whose window fills and whose memory is in use."""
  model = WanConfig(
    dim=256, ffn_dim=512, heads=2, layers=2, in_dim=16, out_dim=16, text_dim=64, text_len=16,
    freq_dim=64, linear=True,
  )  # fmt: skip
  geometry = Geometry(height=16, width=20, ratio=0.5)
  config = StreamConfig(model, geometry, dtype=dtype, backend=backend)
  params = wan.init_params(model, jax.random.key(0))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  noisy = [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
  params = jax.tree.unflatten(tree, noisy)
  text = jax.random.normal(jax.random.key(2), (1, 8, model.text_dim))
  state = init_state(config, wan.text_keys(model, params, text, config.compute_dtype))
  _, video = generate(config, params, state, sample_keys(0, 1), n_chunks=chunks)
  return np.asarray(video, np.float32)


def main(argv: list[str] | None = None) -> int:
  """Command line; the exit status."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
  parser.add_argument("--backends", nargs="+", choices=attention.BACKENDS)
  parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES),
                      help="all by default; none: block map and rollout only")  # fmt: skip
  parser.add_argument("--repeats", type=int, default=20)
  parser.add_argument("--seed", type=int, help="random by default")
  parser.add_argument("--commit", help="commit to record; git's by default")
  parser.add_argument("--out", type=Path, help="JSON file to write the figures to")
  args = parser.parse_args(argv)
  if args.repeats < 1 or (args.seed is not None and args.seed < 0):
    print("check_gpu: give at least one repeat, and a seed from 0 on.", file=sys.stderr)
    return 2
  seed = int(np.random.default_rng().integers(2**31)) if args.seed is None else args.seed
  device = jax.devices()[0]
  print(f"{device.device_kind}, jax {jax.__version__}, seed {seed}")
  names = args.backends or [n for n in attention.BACKENDS if n != "xla"]
  why = available(STREAM, names)
  for name in [n for n in names if why[n] is not None]:  # it may take another dtype
    why |= available(STREAM, [name], jnp.float32)
  for name, reason in why.items():
    if reason is not None:
      print(f"{name} is left out: {reason}")
  names = [name for name, reason in why.items() if reason is None]
  if not names:
    print("check_gpu: there is no backend to check on this machine.", file=sys.stderr)
    return 2
  unserved = set(names) if args.cases else set()
  result: dict[str, Any] = {
    "device": device.device_kind,
    "jax": jax.__version__,
    "commit": args.commit or commit(),
    "seed": seed,
    "repeats": args.repeats,
    "ok": None,  # until all is done
  }
  well = True

  def save():
    """After every row, so that a run that is stopped keeps its figures."""
    if args.out is not None:
      args.out.parent.mkdir(parents=True, exist_ok=True)
      args.out.write_text(json.dumps(result, indent=2) + "\n")

  for name in names:
    for case in args.cases:
      for dtype in ALLOWED:
        row = check_case(case, name, dtype, seed, args.repeats)
        if "skipped" in row:
          print(f"{name:11} {case:12} {dtype:9} left out: {row['skipped']}")
          continue
        unserved.discard(name)
        result.setdefault(name, {})[f"{case}, {dtype}"] = row
        well &= row["ok"]
        save()
        errors = " ".join(f"{k} {e:.1e}" for k, e in row["errors"].items())
        verdict = "ok" if row["ok"] else "FAIL"
        bits = "same bits" if row["same_bits"] else "DIFFERENT BITS"
        print(f"{name:11} {case:12} {dtype:9} {errors} lse {row['lse']:.1e} {bits} {verdict}",
              flush=True)  # fmt: skip
  for name in unserved:
    well = False
    print(f"{name:11} serves none of the cases FAIL")
  row = result["block_map"] = check_block_map(seed)
  well &= row["ok"]
  print(f"block map by {'kernels' if row['kernel'] else 'plain JAX'}: sums of scores off by "
        f"{row['off']:.1e} {'ok' if row['ok'] else 'FAIL'}", flush=True)  # fmt: skip
  with jax.default_matmul_precision("highest"):
    exact = sample("xla", "float32")
  plain = error(sample("xla", "bfloat16"), exact)
  result["rollout"] = {"xla": plain}
  for name in names:
    # A choice between blocks that score nearly the same may fall out otherwise.
    off = error(sample(name, "bfloat16"), exact)
    ok = off <= 1.5 * plain + 1e-2
    well &= ok
    result["rollout"][name] = off
    save()
    print(f"{name:11} rollout of 4 chunks, bfloat16: off float32 by {off:.2e}, plain JAX by "
          f"{plain:.2e} {'ok' if ok else 'FAIL'}", flush=True)  # fmt: skip
  result["ok"] = well
  save()
  return 0 if well else 1


if __name__ == "__main__":
  sys.exit(main())
