"""Times block-sparse attention, its gradients and its block map: `tools/benchmark.py kernels`.

One row for each backend, kind of call and ratio of kept blocks, with the TFLOP/s that the products
amount to, beside dense cuDNN attention in the same run. Lists are random, inputs change from call
to call, every figure is the median of many. `--out` writes the figures as JSON, the best backend's
at the ratio 0.2 under flat keys.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
from kernel_cases import (
  ONE_BUFFER,
  SMALL,
  STREAM,
  Size,
  available,
  commit,
  draw,
  milliseconds,
  milliseconds_in_one,
  problem,
)  # fmt: skip

import pallas_kernels
from pallas_kernels import attention, triton_map

RATIO = 0.2  # of the flat keys
SETS = 4
# Kinds of calls: key in the JSON file, query rows and keys of a block, two buffers, backward.
KINDS = {
  "forward_64x64_ms": (64, 64, False, False),
  "two_buffer_forward_64x64_ms": (64, 64, True, False),
  "forward_128x64_ms": (128, 64, False, False),
  "forward_128x128_ms": (128, 128, False, False),
  "backward_64x64_ms": (64, 64, False, True),
  "two_buffer_backward_64x64_ms": (64, 64, True, True),
}


def flops(size: Size, kept: int, block_k: int, backward: bool) -> float:
  """Multiplications and additions of two products, of five in the backward pass."""
  return (10 if backward else 4) * size.b * size.h * size.s * kept * block_k * size.d


def time_kind(kind: str, backend: str, ratio: float, sizes: dict[bool, Size]) -> dict[str, Any]:
  """One row of the table; of the backward pass of a stream, which has constant past keys."""
  block_q, block_k, two, backward = KINDS[kind]
  size = sizes[two]
  sets = [draw(size, ratio, block_q, block_k, seed=i) for i in range(SETS)]
  p = problem(size, backend, block_q, block_k, past_gradient=not two)
  why = attention.BACKENDS[backend].unsupported(p, sets[0])
  if why is not None:
    return {"skipped": why}
  few = {"calls": 4, "repeats": 3} if backend == "xla" else {}
  if backward:
    forward = jax.jit(lambda x: attention.forward(p, x))
    saved = [(x, *forward(x), x.q[:, ::-1]) for x in sets]
    ms = milliseconds(lambda x: attention.backward(p, *x), saved, **few)
  else:
    ms = milliseconds(lambda x: attention.forward(p, x)[0], sets, **few)
  kept = sets[0].index.shape[3]
  return {"ms": ms, "tflops": flops(size, kept, block_k, backward) / ms / 1e9}


def time_dense(size: Size) -> dict[str, Any]:
  """Dense attention to all keys, by cuDNN on a GPU."""
  sets = [draw(size, RATIO, seed=i)[:3] for i in range(SETS)]
  name = "cudnn" if jax.default_backend() == "gpu" else "xla"
  call = lambda x: jax.nn.dot_product_attention(*x, implementation=name)
  ms = milliseconds(call, sets, calls=20)
  return {"ms": ms, "tflops": 4 * size.b * size.h * size.s * size.n * size.d / ms / 1e9}


def time_block_map(size: Size, backend: str) -> dict[str, dict[str, Any]]:
  """The block map of a stream's chunk, the past keys' means being there already; and its parts."""
  sets = []
  for seed in range(64):
    x = draw(size, RATIO, seed=seed)
    sets.append((x.q, x.k, pallas_kernels.block_means(x.past_k)))
  whole = lambda x: pallas_kernels.block_map(x[0], x[1], RATIO, past_means=x[2], backend=backend)
  means = lambda x: [pallas_kernels.block_means(y) for y in x[:2]]
  if backend == "auto" and triton_map.unsupported(sets[0][0], 64) is None:
    means = lambda x: triton_map.block_means(x[:2])
  calls = {"block map": whole, "of which means": means}
  return {name: {"ms": milliseconds_in_one(call, sets)} for name, call in calls.items()}


def measured(argv: list[str]) -> list[str]:
  """The arguments that have to do with what is measured, for the record."""
  rest = iter(argv)
  return [x for x in rest if not (x in ("--out", "--commit") and next(rest, x))]


def main(argv: list[str]) -> int:
  """Command line; the exit status."""
  parser = argparse.ArgumentParser(
    prog="benchmark.py kernels", description=(__doc__ or "").split("\n\n")[0]
  )
  parser.add_argument("--ratios", type=float, nargs="+", default=[RATIO, 0.1, 0.4, 1.0])
  parser.add_argument("--backends", nargs="+", choices=attention.BACKENDS)
  parser.add_argument("--small", action="store_true", help="small sizes; the default on a CPU")
  parser.add_argument("--commit", help="commit to record; git's by default")
  parser.add_argument("--out", type=Path, help="JSON file to write the figures to")
  args = parser.parse_args(argv)
  if not all(0 < r <= 1 for r in args.ratios):
    print("benchmark: every ratio must be more than 0 and at most 1.", file=sys.stderr)
    return 2
  stream, one = STREAM, ONE_BUFFER
  if args.small or jax.default_backend() == "cpu":
    stream, one = SMALL, SMALL._replace(past=0, n=SMALL.past + SMALL.n)
  device = jax.devices()[0]
  print(f"{device.device_kind}, jax {jax.__version__}, bfloat16, {stream}")
  why = available(stream, args.backends or list(attention.BACKENDS))
  backends = [name for name, reason in why.items() if reason is None]
  for name, reason in why.items():
    if reason is not None:
      print(f"{name} is left out: {reason}")
  result: dict[str, Any] = {
    "backends": {},
    "tflops": {},
    "device": device.device_kind,
    "size": stream._asdict(),
    "dtype": "bfloat16",
    "jax": jax.__version__,
    "commit": args.commit or commit(),
    "command": " ".join(["python tools/benchmark.py kernels", *measured(argv)]),
  }

  def save():
    """After every row, so that a run that is stopped keeps its figures."""
    if args.out is not None:
      args.out.parent.mkdir(parents=True, exist_ok=True)
      args.out.write_text(json.dumps(result, indent=2) + "\n")

  def show(name: str, row: dict[str, Any]):
    rate = f"{row['tflops']:8.1f} TFLOP/s" if "tflops" in row else ""
    text = f"{row['ms']:9.4f} ms {rate}" if "ms" in row else f"left out: {row['skipped']}"
    print(f"{name:58} {text}", flush=True)

  if not backends:
    print("benchmark: there is no backend to time on this machine.", file=sys.stderr)
    return 2
  try:
    save()
  except OSError as e:
    print(
      f"benchmark: {args.out} cannot be written ({e.strerror}); write elsewhere.", file=sys.stderr
    )
    return 2
  dense = time_dense(one)
  key = "dense_cudnn_ms" if jax.default_backend() == "gpu" else "dense_xla_ms"
  show(key.removesuffix("_ms").replace("_", ", "), dense)
  result[key] = dense["ms"]
  for backend in ("auto", "xla"):
    rows = time_block_map(stream, backend)
    for name, row in rows.items():
      show(f"{name}, {backend}", row)
    result["backends"].setdefault("block_map", {})[backend] = rows["block map"]["ms"]
  result["block_map_ms"] = min(result["backends"]["block_map"].values())
  result["tflops"][key] = dense["tflops"]
  for ratio in args.ratios:
    for kind in KINDS:
      for backend in backends:
        if backend == "xla" and ratio != RATIO and len(backends) > 1:
          continue  # slow, and there for correctness
        row = time_kind(kind, backend, ratio, {False: one, True: stream})
        show(f"{kind.removesuffix('_ms')}, {ratio:g} kept, {backend}", row)
        if "ms" in row:
          result["backends"].setdefault(backend, {}).setdefault(f"{ratio:g}", {})[kind] = row["ms"]
          if ratio == RATIO and row["ms"] < result.get(kind, float("inf")):
            result[kind], result["tflops"][kind] = row["ms"], row["tflops"]
          save()
  return 0
