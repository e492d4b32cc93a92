"""Runs of the smallest model by the command itself, and what they leave behind."""

import contextlib
import json
import os
import re
import signal
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from hfjax import parallel, train
from hfjax.data import shards
from hfjax.models.presets import PRESETS, WanConfig
from hfjax.streaming.trees import named
from hfjax.training import config, plan
from hfjax.training.feed import Feed
from hfjax.training.stages import Stage

ROOT = Path(__file__).resolve().parents[2]
SMALL = WanConfig(
  dim=16, ffn_dim=16, heads=2, layers=1, in_dim=4, out_dim=4, text_dim=12, text_len=8, freq_dim=16
)
STEPS = 7
RATE, WARMUP, DECAY, START = 0.01, 2, 0.5, 3
# Every step is kept, so that each can be held against the one before.
FLOW = [
  f"--config={ROOT}/configs/smoke_flow.py",
  *(f"--config.{name}.weights=random:small" for name in ("student", "text")),
  "--config.vae.weights=none",
  "--config.validation.every=0",
  f"--config.steps={STEPS}",
  "--config.batch=2",
  "--config.flow.frames=2",
  "--config.data.made=8",
  f"--config.optimizer.rate={RATE}",
  f"--config.optimizer.warmup={WARMUP}",
  f"--config.ema.decay={DECAY}",
  f"--config.ema.start={START}",
  "--config.checkpoint.every=1",
  "--config.checkpoint.keep=9",
  "--quiet",
]


@contextlib.contextmanager
def small_programs(folder: Path | None = None):
  """The model `random:small`, and updates that are traced and compiled once for all runs.

  folder: of compiled programs; by default one that serves other modules and commands. It is of this
  worker alone, as programs are not written at once, and a warning of a half one fails these tests.
  """
  if folder is None:
    worker = os.environ.get("PYTEST_XDIST_WORKER", "alone")
    folder = Path(os.environ["JAX_COMPILATION_CACHE_DIR"]) / f"runs-{worker}"
  made, make = {}, Stage.make

  def shared(plan, part):
    key = (
      plan.stage, part, plan.objective, plan.optimizer, plan.critic_optimizer, plan.average,
      plan.updates(part), plan.low, plan.text, plan.mesh,
    )  # fmt: skip
    if key not in made:
      made[key] = make(plan, part)
    return made[key]

  options = {
    "jax_compilation_cache_dir": str(folder),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  before = {name: getattr(jax.config, name) for name in options}
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(PRESETS, "small", SMALL)
    patch.setattr(Stage, "make", staticmethod(shared))
    try:
      for name, value in options.items():
        jax.config.update(name, value)
      compilation_cache.reset_cache()
      yield
    finally:
      for name, value in before.items():
        jax.config.update(name, value)
      compilation_cache.reset_cache()


@contextlib.contextmanager
def one_device():
  """Runs on one device, where it takes less to compile and to save."""
  make = parallel.make_mesh
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(parallel, "make_mesh", lambda fsdp: make(fsdp, jax.devices()[:1]))
    yield


def flow(workdir, *more):
  """Exit status of the small run of stage `flow`."""
  return train.main([*FLOW, f"--workdir={workdir}", *more])


def planned(*more):
  return plan.make_plan(config.parse([*FLOW, "--workdir=unused", *more]).config)


@contextlib.contextmanager
def each_batch(act):
  """Calls `act(number, batch)`, counted from 1 in each run, on what the run is fed."""
  call, counts = Feed.__call__, {}

  def fed(self):
    counts[self] = counts.get(self, 0) + 1
    batch = call(self)
    return act(counts[self], batch) or batch

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Feed, "__call__", fed)
    yield


def asks(number, sign=signal.SIGTERM, times=1):
  """What `each_batch` calls to have the run end after that step."""

  def act(count, batch):
    for _ in range(times * (count == number)):
      signal.raise_signal(sign)

  return act


def saved(workdir):
  """Steps of a run's checkpoints."""
  return sorted(int(x.name) for x in (workdir / "checkpoints").iterdir() if x.name.isdigit())


def arrays(workdir, step):
  """All arrays of a checkpoint by name, read with nothing of the trainer; and its note."""
  folder, found = workdir / "checkpoints" / str(step), {}
  for path in folder.iterdir():
    if (path / "_METADATA").exists():
      tree = ocp.PyTreeCheckpointHandler().restore(path)
      found |= {f"{path.name}/{k}": np.asarray(x) for k, x in named(tree).items()}
  return found, json.loads(next((folder / "note").rglob("metadata")).read_text())


def metrics(workdir):
  """Lines of figures, without those that tell of time."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  timed = {
    "time", "step_seconds", "steps_per_second", "samples_per_second", "peak_host_bytes",
  }  # fmt: skip
  return [{k: v for k, v in json.loads(x).items() if k not in timed} for x in lines]


def assert_same_arrays(got, want):
  assert got.keys() == want.keys()
  for name in want:
    np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def videos(folder, frames=2, channels=4, prompts=("a", "b", "c", "d"), context=None):
  """Latents as tools write them, with contexts of so many columns if these are given."""
  shape = (frames, 4, 6, channels)
  told = {"latents": (shape, "float16")}
  told |= {"context": ((None, context), "float32")} if context else {}

  def make(start, stop, reject):
    for i in range(start, stop):
      rows = {"context": np.full((i + 1, context), i + 1.0)} if context else {}
      yield {"prompt": prompts[i], "latents": np.full(shape, i / 8), **rows}

  shards.write(folder, shards.Plan("videos", len(prompts), told, {}), make)
  return f"--config.data.path={folder}"


def said(capsys):
  """Lines on the standard error, none of which is of a traceback or a raw warning."""
  out, error = capsys.readouterr()
  assert "Traceback" not in error and not re.search(r"\.py:\d+:|Warning:", error), error
  assert not out
  return error.splitlines()
