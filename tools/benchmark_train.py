"""Times training steps at full size with random weights: `python tools/benchmark_train.py`.

A critic and a generator step of stage 1 and of stage 2 on one device: student and critic in float32
with Adam, the teacher in bfloat16, one sample of 21 latent frames at the end of rollouts of 7 to 18
chunks. Rollouts are chosen so that their mean number of chunks and exit step are those of training.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataclasses
import shlex
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hfjax import parallel, pipeline
from hfjax.distill.inputs import Texts
from hfjax.distill.objectives import Distillation, Frozen
from hfjax.models import vae, wan
from hfjax.models.geometry import Geometry
from hfjax.models.presets import preset
from hfjax.streaming.config import StreamConfig
from hfjax.training import flops, update
from hfjax.training.optimizers import OptimizerConfig

# Dense bfloat16 products of the device, by the vendor's data sheet, in operations per second.
PEAKS = {"H200": 989.5e12, "H100": 989.5e12}
# (chunks, exit step): the mean is that of training, 12.5 and 1.5.
CASES = ((7, 2), (18, 1), (12, 3), (13, 0))
_TINY = vae.VaeConfig(dim=8, z_dim=16, mean=vae.WAN21.mean, std=vae.WAN21.std)


def objective(stage: int, args: argparse.Namespace) -> Distillation:
  tiny = args.tiny
  linear = stage == 2
  student = preset("tiny") if tiny else preset("hybrid-1.3b" if linear else "wan-1.3b")
  student = dataclasses.replace(student, linear=linear)
  dense = dataclasses.replace(student, linear=False)
  size = {"height": 4, "width": 6} if tiny else {"height": 60, "width": 104}
  semantics: dict[str, Any] = {"variant": "paper", "window": 9, "sink": 3, "ratio": 0.2}
  if stage == 1:
    semantics = {"variant": "reference_dense", "window": 21, "sink": 1, "ratio": 1.0}
  stream = StreamConfig(
    student, Geometry(**size, **semantics), dtype="bfloat16", remat=True, backend=args.backend
  )
  return Distillation(
    stream, dense, dense if tiny else preset(args.teacher), _TINY if tiny else vae.WAN21,
    reflow_weight=0.05 if linear else 0.0, reflow_steps=args.reflow_steps, dtype="bfloat16",
  )  # fmt: skip


def keys(o: Distillation) -> dict[tuple[int, int], jax.Array]:
  """A key for each of CASES."""
  wanted, found = set(CASES), {}
  steer = jax.jit(jax.vmap(lambda key: o.steer(jax.random.split(jax.random.fold_in(key, 0), 3)[0])))
  seeds = jnp.arange(2000)
  chunks, exits = steer(jax.vmap(jax.random.key)(seeds))
  for seed, case in enumerate(zip(chunks.tolist(), exits.tolist(), strict=True)):
    if case in wanted:
      found.setdefault(case, jax.random.key(seed))
  return {case: found[case] for case in CASES}


def timed(step, part, fixed, batch, each, repeats: int, say) -> tuple[Any, dict, dict]:
  """Seconds of each case, medians; the part after them and the last figures."""
  begin = time.perf_counter()
  compiled = step.lower(part, fixed, batch, next(iter(each.values()))).compile()
  memory = compiled.memory_analysis()
  say(
    f"compiled in {time.perf_counter() - begin:.0f} s; arguments "
    f"{memory.argument_size_in_bytes / 1e9:.1f} GB, temporary {memory.temp_size_in_bytes / 1e9:.1f}"
  )
  part, figures = compiled(part, fixed, batch, next(iter(each.values())))
  jax.block_until_ready(figures)
  seconds: dict[tuple[int, int], float] = {}
  for case, key in each.items():
    taken = []
    for _ in range(repeats):
      begin = time.perf_counter()
      part, figures = compiled(part, fixed, batch, key)
      jax.block_until_ready((part, figures))
      taken.append(time.perf_counter() - begin)
    seconds[case] = float(np.median(taken))
    known = {k: float(v) for k, v in figures.items()}
    assert (known["chunks"], known["exit_step"]) == case
    say(f"  {case}: {seconds[case]:.3f} s  {json.dumps(known)}")
    assert known["finite"], "a loss or gradient was not finite"
  return part, seconds, figures


def run(args: argparse.Namespace) -> dict[str, Any]:
  say = lambda words: print(words, flush=True)
  mesh = parallel.make_mesh(1, jax.devices()[:1])
  optimizer = OptimizerConfig(rate=1.5e-6, b1=0.0).make(1000)
  average = update.Average(0.99, 40)
  draw = lambda network, sizes, dtype: pipeline.draw_params(network.init_params, sizes, dtype)
  first = objective(1, args)
  teacher = draw(wan, first.teacher, jnp.bfloat16)
  decoder = draw(vae, first.vae, jnp.bfloat16)
  frozen = Frozen(teacher, decoder)
  model = first.stream.model
  rows = jax.random.normal(jax.random.key(1), (2, model.text_len, model.text_dim)) * 0.1
  batch = Texts(rows[None, :1], rows[None, 1:])
  peak = next((p for name, p in PEAKS.items() if name in jax.devices()[0].device_kind), None)
  result: dict[str, Any] = {}
  rates: dict[str, float] = {}
  for stage in args.stages:
    o = objective(stage, args)
    whole = dataclasses.replace(o, reflow_steps=25)
    each = keys(o)

    def critic_loss(params, fixed, texts, key, o=o):
      return o.critic_loss(params, fixed[0], fixed[1], texts, key)

    def generator_loss(params, fixed, texts, key, o=o):
      return o.generator_loss(params, fixed[0], fixed[1], texts, key)

    def begin(config, averaged):
      params = jax.tree.map(lambda x: x.astype(jnp.float32), draw(wan, config, jnp.float32))
      return update.init_part(params, optimizer, averaged)

    student, critic = begin(o.stream.model, average), begin(o.critic, None)
    for who in args.steps:
      say(f"stage {stage}, {who}")
      if who == "critic":
        step = update.make_update(critic_loss, optimizer, None, mesh, critic)
        part, fixed, count = critic, (student.params, frozen), flops.critic_step
      else:
        step = update.make_update(generator_loss, optimizer, average, mesh, student)
        part, fixed, count = student, (critic.params, frozen), flops.generator_step
      part, seconds, _ = timed(step, part, fixed, batch, each, args.repeats, say)
      if who == "critic":
        critic = part
      else:
        student = part
      mean = sum(seconds.values()) / len(seconds)
      work = sum(count(o, *case) for case in CASES) / len(CASES)
      result[f"stage{stage}_{who}_s"] = round(mean, 3)
      if peak:
        rates[f"mfu_stage{stage}_{who}"] = round(work / mean / peak, 4)
      say(f"  mean {mean:.3f} s, {work / 1e12:.0f} TFLOP, {work / mean / 1e12:.0f} TFLOP/s")
      if stage == 2 and who == "generator":
        one = teacher_step(o, frozen, batch, args.repeats)
        result["teacher_step_s"] = round(one, 3)
        more = one * (whole.reflow_steps - o.reflow_steps) / len(o.stream.steps)
        result["stage2_generator_25_steps_s"] = round(mean + more, 3)
      step.clear_cache()
    del student, critic, part, fixed
  stats = jax.devices()[0].memory_stats() or {}
  result["peak_memory_gb"] = round(stats.get("peak_bytes_in_use", 0) / 1e9, 2)
  result["mfu_critic"] = rates.get("mfu_stage1_critic")
  return result | rates


def teacher_step(o: Distillation, frozen: Frozen, batch: Texts, repeats: int) -> float:
  """Seconds of one step of a teacher's trajectory: flows under both texts."""
  g = o.stream.geometry
  x = jax.random.normal(
    jax.random.key(3), (1, o.last * g.chunk, g.height, g.width, o.teacher.in_dim)
  )
  texts = Texts(batch.context[0], batch.negative[0])
  step = jax.jit(lambda p, x: o.both_flows(o.teacher, p, x, jnp.full(1, 500.0), texts)[0])
  jax.block_until_ready(step(frozen.teacher, x))
  taken = []
  for _ in range(repeats):
    begin = time.perf_counter()
    jax.block_until_ready(step(frozen.teacher, x))
    taken.append(time.perf_counter() - begin)
  return float(np.median(taken))


def commit() -> str:
  try:
    return subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip()
  except (OSError, subprocess.CalledProcessError):
    return "unknown"


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", type=Path, help="JSON file to write, or to add to")
  parser.add_argument("--tiny", action="store_true", help="small networks, to try the script")
  parser.add_argument("--teacher", default="wan-14b", help="preset of the teacher")
  parser.add_argument("--reflow_steps", type=int, default=2, help="of the teacher, in stage 2")
  parser.add_argument("--repeats", type=int, default=2)
  parser.add_argument("--backend", default="auto", help="of block-sparse attention")
  parser.add_argument("--commit", default=None, help="to record, where git is not there")
  parser.add_argument("--stages", type=int, nargs="+", default=[1, 2], choices=(1, 2))
  parser.add_argument(
    "--steps", nargs="+", default=["critic", "generator"], choices=("critic", "generator")
  )
  args = parser.parse_args()
  about = {
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "commit": args.commit or commit(),
    "command": shlex.join(["python", "tools/benchmark_train.py", *sys.argv[1:]]),
  }
  result = run(args) | about
  if args.out and args.out.exists():  # of other stages or steps
    before = json.loads(args.out.read_text())
    if any(before[k] != result[k] for k in ("device", "jax", "commit")):
      raise SystemExit(f"{args.out} is of another device, jax or commit; give another file.")
    peak = max(before["peak_memory_gb"], result["peak_memory_gb"])
    commands = {"command": f"{before['command']}; {result['command']}"}
    result = before | {k: v for k, v in result.items() if v is not None}
    result |= {"peak_memory_gb": peak} | commands
  print(json.dumps(result, indent=2))
  if args.out:
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
  main()
