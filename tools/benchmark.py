"""Times the streaming transformer, chunk by chunk, with random weights: `make bench`.

Prints one row per part of a chunk and the frames per second of the whole (diffusion transformer
only: no decoder is part of it). Every figure is the median of several chunks after the window has
filled; times are wall-clock, with the device waited for.

`tools/benchmark.py kernels` times the kernels of block-sparse attention instead.
"""

import argparse
import json
import platform
import re
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp

from hfjax.models import wan
from hfjax.models.geometry import VARIANTS, Geometry
from hfjax.models.presets import PRESETS, preset
from hfjax.streaming.config import StreamConfig
from hfjax.streaming.latent_stream import sample_keys
from hfjax.streaming.state import begin_chunk, init_state
from hfjax.streaming.step import chunk_step, commit, denoise, draw_noise

# Pixels per latent row and column, and video frames per latent frame, of the Wan VAE.
PIXELS, FRAMES = 8, 4


def random_params(config, dtype):
  """Parameters without zeros; speed does not depend on them."""

  @jax.jit
  def make(key):
    params = wan.init_params(config, key)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    noisy = [
      (x + 0.01 * jax.random.normal(k, x.shape)).astype(dtype)
      for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, noisy)

  return make(jax.random.key(0))


def seconds(call, repeats: int) -> float:
  """Median seconds of `call`, its result waited for."""
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - start)
  return statistics.median(times)


def measure(config: StreamConfig, batch: int, repeats: int) -> dict[str, Any]:
  """Seconds of each part of a chunk, and of a whole one."""
  g, m = config.geometry, config.model
  params = random_params(m, config.compute_dtype)
  context = jax.random.normal(jax.random.key(1), (batch, m.text_len, m.text_dim))
  state = init_state(config, wan.text_keys(m, params, context, config.compute_dtype))
  keys = sample_keys(0, batch)

  @partial(jax.jit, donate_argnums=1)
  def advance(params, state):
    return chunk_step(config, params, state, draw_noise(config, keys, state.chunk))

  start = time.perf_counter()
  state, x0 = advance(params, state)
  jax.block_until_ready(x0)
  compile_s = time.perf_counter() - start
  # Until the window is full and frames leave it.
  for _ in range(g.past // g.chunk + 2):
    state, x0 = advance(params, state)
  whole = []
  for _ in range(repeats):
    jax.block_until_ready(x0)
    start = time.perf_counter()
    state, x0 = advance(params, state)
    jax.block_until_ready(x0)
    whole.append(time.perf_counter() - start)

  begin = jax.jit(partial(begin_chunk, config))
  forward = jax.jit(partial(denoise, config))
  close = jax.jit(partial(commit, config))
  chunk = begin(state)
  t = jnp.full((batch,), 500.0)
  parts = {
    "begin": lambda: begin(state),
    "forward": lambda: forward(params, chunk, x0, t),
    "commit": lambda: close(params, chunk, x0),
  }
  result = {"compile_s": compile_s}
  for name, call in parts.items():
    jax.block_until_ready(call())
    result[f"{name}_s"] = seconds(call, repeats)
  result["chunk_s"] = statistics.median(whole)
  result["frames_per_second"] = batch * g.chunk * FRAMES / result["chunk_s"]
  stats = jax.devices()[0].memory_stats() or {}
  result["peak_bytes"] = stats.get("peak_bytes_in_use")
  return result


def latent_size(size: str) -> tuple[int, int]:
  """Latent columns and rows of a size in pixels, "WxH"; ValueError if it is none."""
  match = re.fullmatch(r"(\d+)x(\d+)", size)
  if not match or any(int(n) % PIXELS for n in match.groups()):
    raise ValueError(
      f"The size is {size!r}; give WIDTHxHEIGHT in pixels, multiples of {2 * PIXELS}, say 832x480."
    )
  return int(match[1]) // PIXELS, int(match[2]) // PIXELS


def main(argv: list[str] | None = None) -> int:
  """Command line; the exit status."""
  argv = sys.argv[1:] if argv is None else argv
  if argv[:1] == ["kernels"]:
    import benchmark_kernels

    return benchmark_kernels.main(argv[1:])
  on_cpu = jax.default_backend() == "cpu"
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
  parser.add_argument("--model", default="tiny" if on_cpu else "hybrid-1.3b", choices=PRESETS)
  parser.add_argument("--size", default="160x96" if on_cpu else "832x480", help="pixels, WxH")
  parser.add_argument("--variant", default="paper", choices=VARIANTS)
  parser.add_argument("--ratio", type=float, default=0.2, help="share of key blocks kept")
  parser.add_argument("--window", type=int, default=9, help="latent frames that attention sees")
  parser.add_argument("--sink", type=int, default=3, help="latent frames seen for ever")
  parser.add_argument("--dtype", default="float32" if on_cpu else "bfloat16")
  parser.add_argument("--batch", type=int, default=1)
  parser.add_argument("--backend", default="auto", help="of block-sparse attention")
  parser.add_argument("--repeats", type=int, default=10)
  parser.add_argument("--out", type=Path, help="JSON file to write the figures to")
  args = parser.parse_args(argv)
  try:
    width, height = latent_size(args.size)
    geometry = Geometry(
      height,
      width,
      ratio=args.ratio,
      window=args.window,
      sink=args.sink,
      variant=args.variant,
    )
    config = StreamConfig(preset(args.model), geometry, dtype=args.dtype, backend=args.backend)
    if min(args.batch, args.repeats) < 1:
      raise ValueError("Batch and repeats must be at least 1.")
  except ValueError as e:
    print(f"benchmark: {e}", file=sys.stderr)
    return 2

  device = jax.devices()[0]
  result = {
    "model": args.model,
    "size": args.size,
    "variant": args.variant,
    "ratio": args.ratio,
    "window": geometry.window,
    "sink": args.sink,
    "dtype": args.dtype,
    "backend": args.backend,
    "batch": args.batch,
    "steps": len(config.steps),
    "device": device.device_kind,
    "jax": jax.__version__,
    "python": platform.python_version(),
    **measure(config, args.batch, args.repeats),
  }
  title = ("model", "size", "variant", "ratio", "dtype", "batch", "device")
  print(", ".join(f"{k} {result[k]}" for k in title))
  for name in ("begin", "forward", "commit", "chunk"):
    print(f"{name:10} {1000 * result[f'{name}_s']:10.2f} ms")
  print(f"{'compile':10} {result['compile_s']:10.2f} s")
  if result["peak_bytes"] is not None:
    print(f"{'memory':10} {result['peak_bytes'] / 2**30:10.2f} GiB at most")
  print(f"{'FPS':10} {result['frames_per_second']:10.2f} (transformer only, no decoder)")
  if args.out is not None:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
