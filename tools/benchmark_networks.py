"""Times autoencoders and text encoder with random weights.

`python tools/benchmark_networks.py vae` (or taehv, umt5).

Prints the median time of a streaming decoding step (3 latent frames, 12 video frames) and of the
matching encoding step, or of encoding one prompt of 512 tokens; then the time of a whole clip of 81
frames, and the most memory that was in use (weights included).
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp

from hfjax.models import taehv, umt5, vae

LATENTS = 3  # of a streaming step


def cast(params, dtype):
  return jax.tree.map(lambda x: x.astype(dtype), params)


def clock(name: str, call, repeats: int, frames: int = 0):
  """Prints the median time of `call` after a first one, and frames per second."""
  jax.block_until_ready(call())
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - start)
  median = statistics.median(times)
  rate = f", {frames / median:.1f} FPS" if frames else ""
  print(f"{name:16} {1000 * median:9.2f} ms{rate}")


def autoencoder(network, config, rows: int, columns: int, dtype, repeats: int):
  params = jax.jit(lambda k: cast(network.init_params(config, k), dtype))(jax.random.key(0))
  z = jax.random.normal(jax.random.key(1), (1, 21, rows, columns, config.z_dim))
  _, cache = jax.jit(partial(network.decode_first, config, dtype=dtype))(params, z[:, :1])
  step = jax.jit(partial(network.decode_chunk, config))
  frames = LATENTS * config.time_factor
  clock("decode step", lambda: step(params, cache, z[:, :LATENTS])[0], repeats, frames)
  clip = jax.jit(partial(network.decode, config, dtype=dtype))
  clock("decode clip", lambda: clip(params, z), 2, 81)
  report_memory("decoding")
  video = step(params, cache, z[:, :LATENTS])[0]
  past = network.init_encoder_cache(config, 1, rows, columns, dtype)
  back = jax.jit(partial(network.encode_chunk, config))
  clock("encode step", lambda: back(params, past, video)[0], repeats, frames)
  report_memory("both")


def text_encoder(config, dtype, repeats: int):
  params = jax.jit(lambda k: cast(umt5.init_params(config, k), dtype))(jax.random.key(0))
  ids = jnp.ones((1, 512), jnp.int32)
  run = jax.jit(partial(umt5.encode, config, dtype=dtype))
  clock("encode prompt", lambda: run(params, ids, jnp.array([512])), repeats)
  report_memory("encoding")


def report_memory(what: str):
  """Prints the most device memory in use so far, where the platform tells."""
  stats = jax.devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in stats:
    print(f"{'memory':16} {stats['peak_bytes_in_use'] / 2**30:9.2f} GiB at most, {what}")


def main(argv: list[str] | None = None) -> int:
  """Command line; the exit status."""
  on_cpu = jax.default_backend() == "cpu"
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
  parser.add_argument("network", choices=("vae", "taehv", "umt5"))
  parser.add_argument(
    "--latents",
    type=int,
    nargs=2,
    default=(8, 8) if on_cpu else (60, 104),
    metavar=("ROWS", "COLUMNS"),
    help="latent grid; 60 104 is 832 x 480 pixels",
  )
  parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
  parser.add_argument("--repeats", type=int, default=10)
  args = parser.parse_args(argv)
  if min(*args.latents, args.repeats) < 1:
    print("benchmark_networks: latents and repeats must be at least 1.", file=sys.stderr)
    return 2
  device, dtype = jax.devices()[0].device_kind, jnp.dtype(args.dtype)
  print(f"{args.network}, latents {args.latents[0]} x {args.latents[1]}, {args.dtype}, {device}")
  if args.network == "umt5":
    small = umt5.Umt5Config(vocab=1000, dim=64, dim_attn=64, dim_ffn=128, heads=4, layers=2)
    text_encoder(small if on_cpu else umt5.PRESETS["umt5-xxl"], dtype, args.repeats)
  elif args.network == "vae":
    autoencoder(vae, vae.WAN21, *args.latents, dtype, args.repeats)
  else:
    autoencoder(taehv, taehv.TAEHV, *args.latents, dtype, args.repeats)
  return 0


if __name__ == "__main__":
  sys.exit(main())
