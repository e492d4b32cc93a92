"""All stages in a row, and runs that are ended from outside or go on elsewhere."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax import parallel, sample, train
from hfjax.distill.objectives import Frozen
from hfjax.models.umt5 import Umt5Config
from hfjax.models.vae import WAN21
from hfjax.training import config, feed, loop, plan, weights
from hfjax.training.stages import Stage
from hfjax.training.update import Part
from hfjax.video import read_image, read_video
from tests.convert import helpers
from tests.test_pipeline import write
from tests.training.runs import (
  FLOW,
  ROOT,
  STEPS,
  arrays,
  asks,
  assert_same_arrays,
  each_batch,
  flow,
  metrics,
  saved,
  small_programs,
)

# Fewer steps than the configs have, as compiling takes most of the time anyway.
CHAIN = {
  "flow": ["steps=4", "ema.start=2", "validation.every=4"],
  "ode": ["steps=2", "init={}/flow", "teacher.weights={}/flow", "data.made=4"],
  "stage1": ["steps=3", "init={}/ode", "critic.weights={}/flow", "teacher.weights={}/flow"],
  "stage2": [
    "steps=3",
    "init={}/stage1",
    "critic.weights={}/flow",
    "teacher.weights={}/flow",
    "distill.regression_weight=0.5",
    "ode.frames=9",
    "data.made=4",
  ],
}
KINDS = {
  "flow": {"student/unweighted_loss", "student/ema_distance"},
  "ode": set(),
  "stage1": {"student/matching_loss", "student/score_gradient", "student/exit_step",
             "critic/chunks", "critic/learning_rate"},
  "stage2": {"student/reflow_loss", "student/matching_loss", "student/regression_loss",
             "critic/loss"},
}  # fmt: skip


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
  folder = tmp_path_factory.mktemp("programs")
  with small_programs(folder):
    yield folder


def distilled(*more):
  """The plan of stage `dmd` with the smallest networks."""
  argv = [f"--config={ROOT}/configs/smoke_stage1.py", "--workdir=unused", "--config.steps=11"]
  argv += [f"--config.{x}.weights=random:small" for x in ("student", "critic", "teacher", "text")]
  argv += ["--config.vae.weights=none", "--config.distill.last=1", "--config.distill.most=2"]
  return plan.make_plan(config.parse([*argv, "--config.geometry.chunk=1", *more]).config)


def test_the_student_is_updated_every_so_many_steps(programs, monkeypatch):
  p = distilled("--config.distill.generator_every=5")
  seen = []

  def make(p, name):
    def update(part, fixed, batch, key):
      seen.append((name, batch, part, fixed, tuple(jax.random.key_data(key).tolist())))
      return part._replace(params=part.params + 1), {"loss": 0}

    return update

  monkeypatch.setattr(Stage, "make", staticmethod(make))
  starts = {"student": 0, "critic": 50}
  parts = {name: Part(start, None, None, 0, 0, 0) for name, start in starts.items()}
  stage = Stage(p, parts, None, Frozen("teacher"))
  numbers = iter(range(100))
  figures = [stage.step(number, lambda: next(numbers)) for number in range(11)]
  both = (0, 5, 10)
  assert [{*x} for x in figures] == [
    {"student", "critic"} if i in both else {"critic"} for i in range(11)
  ]
  order = [name for i in range(11) for name in (["student"] * (i in both) + ["critic"])]
  assert [x[0] for x in seen] == order
  # Each update has a batch and a key of its own, and sees the other network as it is then.
  assert [x[1] for x in seen] == [*range(14)] and len({x[4] for x in seen}) == 14
  others = [x[3].other for x in seen if x[0] == "student"]
  assert others == [50, 55, 60]
  students = [x[3].other for x in seen if x[0] == "critic"]
  assert students == [1] * 5 + [2] * 5 + [3]
  assert all(x[3].frozen.teacher == "teacher" and x[3].base is None for x in seen)
  # The same steps have the same keys, whatever was before.
  keys = [x[4] for x in seen]
  stage.step(10, lambda: 0)
  assert [x[4] for x in seen[-2:]] == keys[-2:]
  assert p.updates("student") == 3 and p.updates("critic") == 11


def test_lengths_of_trajectories_count_where_there_are_any():
  two = "--config.geometry.chunk=2"
  assert distilled(two).trajectory_shape is None
  weight = "--config.distill.regression_weight=0.5"
  p = distilled(two, weight, "--config.ode.frames=8")
  assert p.trajectory_shape == (len(p.stream.steps) + 1, 8, *p.latent_shape[1:])
  with pytest.raises(config.ConfigError, match="ode.frames is 21; give a multiple of the chunk of"):
    distilled(two, weight)


@pytest.mark.slow
def test_steps_of_distillation_change_what_they_should(programs, tmp_path):
  p = distilled("--config.distill.generator_every=2")
  encode = weights.Encoder(p)
  fed = feed.Feed(p, encode, tmp_path, print)
  parts = {name: loop._part(p, name, draw(p, name)) for name in p.parts}
  stage = Stage(p, parts, None, Frozen(weights.load_teacher(p)))
  before = jax.device_get(stage.parts)
  figures = jax.device_get(stage.step(0, fed))
  first = jax.device_get(stage.parts)
  later = jax.device_get(stage.step(1, fed))
  second = jax.device_get(stage.parts)
  assert {*figures} == {"student", "critic"} and {*later} == {"critic"}
  assert all(x["finite"] and np.isfinite(x["loss"]) for x in [*figures.values(), *later.values()])
  moved = lambda a, b: any(np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (a, b))))
  for name in ("student", "critic"):
    assert moved(before[name].params, first[name].params)
  jax.tree.map(np.testing.assert_array_equal, first["student"], second["student"])
  assert moved(first["critic"].params, second["critic"].params)
  assert (int(second["student"].updates), int(second["critic"].updates)) == (1, 2)


def draw(p, name):
  """Weights none of which is without effect."""
  from hfjax import pipeline
  from hfjax.models import wan

  network = p.critic if name == "critic" else p.student
  return pipeline.draw_params(wan.init_params, network, jnp.float32)


@pytest.mark.slow
def test_all_stages_in_a_row(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  for name, options in CHAIN.items():
    more = [f"--config.{x.format('.')}" for x in options]
    command = [f"--config={ROOT}/configs/smoke_{name}.py", f"--workdir={name}", "--quiet", *more]
    assert train.main(command) == 0, capsys.readouterr().err
    out, error = capsys.readouterr()
    steps = int(options[0].removeprefix("steps="))
    assert not out and "Traceback" not in error and "Warning" not in error, error
    assert error.splitlines()[-1] == f"All {steps} steps are made; {name} holds the run."
    rows = metrics(tmp_path / name)
    told = set().union(*rows)
    assert [row["step"] for row in rows] == [*range(1, steps + 1)] and KINDS[name] <= told
    assert any(x.startswith("student/loss_step") for x in told) == (name == "ode")
    assert all(row["critic/skipped" if "stage" in name else "student/skipped"] == 0 for row in rows)
    kinds = ("raw",) if name == "ode" else ("raw", "ema")
    files = sorted(x.name for x in (tmp_path / name / "videos").iterdir())
    stems = [f"step-{steps:06d}-{kind}-{i}" for kind in kinds for i in (0, 1)]
    assert files == sorted(stem + end for stem in stems for end in (".mp4", ".png"))
    for stem in stems:
      clip = read_video(f"{name}/videos/{stem}.mp4")
      assert clip.frames.shape == (25, 32, 48, 3) and clip.fps == 16
      assert read_image(f"{name}/videos/{stem}.png").size
    # A second call has nothing to do.
    assert train.main(command) == 0
    words = f"{name} has made {steps} steps, and steps is {steps}; raise it to go on."
    assert capsys.readouterr().err.splitlines() == [words]
  check_samples(tmp_path, capsys)


def check_samples(folder, capsys):
  """The last run is converted, weights and averages, and videos are made with both."""
  encoder = Umt5Config(vocab=20, dim=48, dim_attn=24, dim_ffn=12, heads=4, layers=1)
  write(folder / "rest", {"vae": dataclasses.replace(WAN21, dim=4), "umt5": encoder})
  for item, more in (("student", []), ("ema", ["--ema"])):
    place = folder / f"weights-{item}"
    assert helpers.convert(folder / "rest", place) == 0
    # Beside what is there; it replaces models of its own kind alone.
    more = [*more, "--overwrite"]
    assert helpers.convert(folder / "stage2", place, *more) == 0, capsys.readouterr().err
    told = json.loads((place / "dit" / "config.json").read_text())
    assert "paper" in json.dumps(told) and "hybrid" in json.dumps(told)
    command = [f"--weights={place}", f"--out={item}.mp4", "--prompt=a red square", "--quiet"]
    command += ["--size=48x32", "--frames=9", "--window=6", "--steps=1000,500", "--dtype=float32"]
    assert sample.main(command) == 0, capsys.readouterr().err
    assert read_video(f"{item}.mp4").frames.shape == (9, 32, 48, 3)


# Runs in processes of their own

TINY = [x.replace("random:small", "random:tiny") for x in FLOW] + ["--config.steps=12"]


def begin(workdir, programs):
  """The flow stage with the model that the command knows."""
  kept = {
    "JAX_COMPILATION_CACHE_DIR": str(programs),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }
  command = [sys.executable, "-m", "hfjax.train", *TINY, f"--workdir={workdir}"]
  return subprocess.Popen(
    command, cwd=ROOT, env=os.environ | kept, stderr=subprocess.PIPE, text=True
  )


def ends(process):
  """Exit status, and the standard error."""
  error = process.communicate(timeout=600)[1]
  assert "Traceback" not in error, error
  return process.returncode, error


def at_step(process, workdir, step, number):
  """Sends a signal once so many steps have their figures."""
  file = workdir / "metrics.jsonl"
  while process.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") < step):
    time.sleep(0.005)
  assert process.poll() is None
  process.send_signal(number)


@pytest.mark.slow
def test_what_is_killed_goes_on_with_the_same_numbers(tmp_path, programs):
  seed = int(os.environ.get("HFJAX_SEED", 0)) or time.time_ns() % 2**32
  print(f"HFJAX_SEED={seed}")
  draw = random.Random(seed)
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  assert ends(begin(whole, programs))[0] == 0
  process = begin(broken, programs)
  at_step(process, broken, draw.randint(1, 4), signal.SIGTERM)
  status, error = ends(process)
  at = saved(broken)[-1]
  assert status == 0 and f"Stopped after step {at}, which is saved" in error and at < 12
  process = begin(broken, programs)
  at_step(process, broken, draw.randint(at + 1, 10), signal.SIGKILL)
  status, error = ends(process)
  assert status == -signal.SIGKILL and f"Going on after step {at}." in error
  status, error = ends(begin(broken, programs))
  assert status == 0 and "All 12 steps are made" in error
  assert metrics(broken) == metrics(whole)
  (got, note), (want, whole_note) = arrays(broken, 12), arrays(whole, 12)
  assert_same_arrays(got, want)
  assert note["data"] == whole_note["data"]
  assert not [*broken.rglob("*.orbax-checkpoint-tmp*"), *broken.glob(".*.part")]


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_devices(tmp_path, programs, monkeypatch):
  # Everything is split that can be, however small.
  spec = parallel.spec
  monkeypatch.setattr(parallel, "spec", lambda mesh, shape, smallest: spec(mesh, shape, 1))
  p = plan.make_plan(config.parse([*FLOW, "--workdir=unused"]).config)
  kernel = p.part_shapes("student").params["head"]["projection"]["kernel"]
  assert p.mesh.size == 2 and not kernel.sharding.is_fully_replicated
  whole, other = tmp_path / "whole", tmp_path / "other"
  assert flow(whole) == 0
  with each_batch(asks(3)):
    assert flow(other) == 0
  make = parallel.make_mesh
  with monkeypatch.context() as patch:
    patch.setattr(parallel, "make_mesh", lambda fsdp: make(fsdp, jax.devices()[:1]))
    with each_batch(asks(2)):
      assert flow(other) == 0
  assert saved(other)[-1] == 5
  # And back, with devices that share the batch alone.
  assert flow(other, "--config.compute.fsdp=1") == 0
  rows, want = metrics(other), metrics(whole)
  assert [row["step"] for row in rows] == [*range(1, STEPS + 1)]
  assert rows[:3] == want[:3]
  for row, wanted in zip(rows, want, strict=True):
    assert row.keys() == wanted.keys()
    np.testing.assert_allclose([*row.values()], [*wanted.values()], rtol=1e-4, atol=1e-6)
  got, exact = arrays(other, STEPS)[0], arrays(whole, STEPS)[0]
  for name, value in exact.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
