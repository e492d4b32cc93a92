"""The command that trains, on the smallest run: what it writes, how it goes on, what it refuses."""

import fcntl
import json
import math
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from hfjax import convert
from hfjax.data.rejects import DataError
from hfjax.models import wan
from hfjax.training import config, loop, lora, weights
from hfjax.training.checkpoints import Checkpoints
from hfjax.training.config import ConfigError
from hfjax.training.stages import Stage
from tests.helpers import files_at_most
from tests.training.runs import (
  DECAY,
  FLOW,
  RATE,
  ROOT,
  SMALL,
  START,
  STEPS,
  WARMUP,
  arrays,
  asks,
  assert_same_arrays,
  each_batch,
  flow,
  metrics,
  planned,
  said,
  saved,
  small_programs,
  videos,
)

ADAPTERS = "--config.lora.rank=2"


@pytest.fixture(scope="module", autouse=True)
def programs():
  with small_programs():
    yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run that nothing interrupts, and the latents that it was fed."""
  folder, fed = tmp_path_factory.mktemp("whole") / "run", []
  with each_batch(lambda _, batch: fed.append(np.asarray(batch["latents"]))):
    assert flow(folder) == 0
  return folder, fed


# What a run leaves behind


def test_every_step_has_its_figures(whole):
  rows = metrics(whole[0])
  assert [row["step"] for row in rows] == [*range(1, STEPS + 1)]
  names = "loss unweighted_loss gradient_norm parameter_norm ema_distance updates skipped in_row"
  want = {f"student/{name}" for name in [*names.split(), "learning_rate"]}
  assert all({*row} == {"step", "data/rejected", "data/cut_prompts", *want} for row in rows)
  assert all(math.isfinite(x) for row in rows for x in row.values())
  assert [row["student/updates"] for row in rows] == [row["step"] for row in rows]
  lines = (whole[0] / "metrics.jsonl").read_text().splitlines()
  assert "samples_per_second" in json.loads(lines[-1])
  assert any((whole[0] / "tensorboard").iterdir())


def test_learning_rates_are_those_of_the_schedule(whole):
  rates = [row["student/learning_rate"] for row in metrics(whole[0])]
  rise = [RATE * i / WARMUP for i in range(WARMUP)]
  fall = [RATE * (1 + math.cos(math.pi * i / (STEPS - WARMUP))) / 2 for i in range(STEPS - WARMUP)]
  np.testing.assert_allclose(rates, rise + fall, rtol=1e-5)
  # They are what was applied: at a rate of zero nothing moves, and afterwards the weights do.
  start = weights.load_trained(planned(), "student")["head"]["projection"]["kernel"]
  first, second = (arrays(whole[0], i)[0]["student/head/projection/kernel"] for i in (1, 2))
  np.testing.assert_array_equal(first, start)
  assert np.any(second != first)
  norms = [row["student/parameter_norm"] for row in metrics(whole[0])]
  leaves = [x for k, x in arrays(whole[0], 1)[0].items() if k.startswith("student/")]
  size = math.sqrt(sum(np.sum(np.float64(x) ** 2) for x in leaves))
  np.testing.assert_allclose(norms[0], size, rtol=1e-5)


def test_averages_begin_where_they_should(whole):
  held = [arrays(whole[0], step)[0] for step in range(1, STEPS + 1)]
  names = [k.removeprefix("ema/") for k in held[0] if k.startswith("ema/")]
  assert names
  for name in names:
    ema = held[0][f"student/{name}"]
    for step, found in enumerate(held, 1):
      now = found[f"student/{name}"]
      ema = now if step <= START else DECAY * ema + (1 - DECAY) * now
      np.testing.assert_allclose(found[f"ema/{name}"], ema, rtol=1e-5, atol=1e-7, err_msg=name)
  assert np.any(
    held[-1]["ema/head/projection/kernel"] != held[-1]["student/head/projection/kernel"]
  )


@pytest.mark.parametrize("relative", [False, True])
def test_a_run_is_a_source_of_weights(whole, monkeypatch, relative):
  monkeypatch.chdir(whole[0].parent)
  place = whole[0].name if relative else str(whole[0])
  for averaged, item in ((False, "student"), (True, "ema")):
    loaded = convert.load(place, "dit", averaged=averaged, dtype="float32")
    want = arrays(whole[0], STEPS)[0][f"{item}/head/projection/kernel"]
    np.testing.assert_array_equal(loaded.params["head"]["projection"]["kernel"], want)
  assert loaded.config == SMALL and loaded.preset == "wan"


# Going on


@pytest.mark.parametrize("number", [1, 4])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(whole, tmp_path, capsys, number):
  fed = []
  with each_batch(asks(number)):
    assert flow(tmp_path) == 0
  lines = said(capsys)
  assert lines[-1] == f"Stopped after step {number}, which is saved; the same command goes on."
  assert lines[0].startswith("Stopping after this step, and saving")
  assert saved(tmp_path) == [*range(1, number + 1)]
  # What does not change numbers may be changed.
  free = ["--config.log.tensorboard=False", "--config.most_skipped=3", "--config.data.prefetch=0"]
  with each_batch(lambda _, batch: fed.append(np.asarray(batch["latents"]))):
    assert flow(tmp_path, *free) == 0
  assert f"Going on after step {number}." in said(capsys)
  np.testing.assert_array_equal(fed, whole[1][number:])
  assert metrics(tmp_path) == metrics(whole[0])
  for step in (number, STEPS):
    (got, note), (want, whole_note) = arrays(tmp_path, step), arrays(whole[0], step)
    assert_same_arrays(got, want)
    assert note["data"] == whole_note["data"]
  assert {k.split("/")[0] for k in want} == {"student", "ema", "optimizers"}


@pytest.mark.parametrize(("times", "step"), [(1, 2), (2, 1)], ids=["once", "twice"])
def test_ctrl_c_stops_after_a_step_or_at_once(tmp_path, capsys, times, step):
  before = signal.getsignal(signal.SIGINT)
  with each_batch(asks(2, signal.SIGINT, times)):
    assert flow(tmp_path) == 130
  assert signal.getsignal(signal.SIGINT) == before
  assert saved(tmp_path)[-1] == step
  last = "the same command goes on." if times == 1 else "what was saved before is whole."
  assert said(capsys)[-1].endswith(last)


def test_before_the_first_step_there_is_nothing_to_save(tmp_path, capsys, monkeypatch):
  begin = weights.load_trained

  def load(*args):
    signal.raise_signal(signal.SIGTERM)
    return begin(*args)

  monkeypatch.setattr(weights, "load_trained", load)
  assert flow(tmp_path) == 0 and saved(tmp_path) == []
  assert said(capsys)[-1] == "Stopped before the first step; the same command begins anew."


def test_the_checkpoint_before_a_damaged_one_is_gone_on_from(whole, tmp_path, capsys):
  folder = shutil.copytree(whole[0], tmp_path / "run")
  places = [x for x in (folder / "checkpoints" / str(STEPS)).rglob("*") if x.is_file()]
  with max(places, key=lambda x: x.stat().st_size).open("r+b") as file:
    file.truncate(10)
  # Finished, it is not looked at; so one more step is asked for.
  assert flow(folder, f"--config.steps={STEPS + 1}") == 0
  lines = said(capsys)
  assert f"The checkpoint of step {STEPS} is damaged" in lines[0]
  assert lines[1] == f"Going on after step {STEPS - 1}."
  assert saved(folder) == [*range(1, STEPS + 2)]
  assert metrics(folder)[: STEPS - 1] == metrics(whole[0])[:-1]
  assert [row["step"] for row in metrics(folder)] == [*range(1, STEPS + 2)]


@pytest.mark.parametrize("steps", [STEPS, STEPS - 2])
def test_a_finished_run_says_so(whole, capsys, steps):
  before = (whole[0] / "metrics.jsonl").read_bytes()
  assert flow(whole[0], f"--config.steps={steps}", "--config.log.every=2") == 0
  assert said(capsys) == [
    f"{whole[0]} has made {STEPS} steps, and steps is {steps}; raise it to go on."
  ]
  assert (whole[0] / "metrics.jsonl").read_bytes() == before


# What is not finite


def test_updates_that_are_not_finite_are_left_out_until_there_are_too_many(tmp_path, capsys):
  def poison(number, batch):
    return {**batch, "latents": batch["latents"] * (np.nan if number in (2, 4, 5) else 1)}

  with each_batch(poison):
    assert flow(tmp_path, "--config.most_skipped=2", "--config.checkpoint.every=100") == 1
  lines = said(capsys)
  begin = "a loss or gradient of the student was not finite, and its update was left out"
  told = [line for line in lines if begin in line]
  counts = [(2, 1, 1), (4, 1, 2), (5, 2, 3)]
  assert told == [f"Step {i}: {begin} ({row} in a row, {n} in all)." for i, row, n in counts]
  assert lines[-1].startswith("train: 2 updates of the student in a row were not finite. Training")
  (at,) = saved(tmp_path)
  assert f"after step {at}, which is saved in {tmp_path}" in lines[-1] and at in (5, 6)
  held, _ = arrays(tmp_path, at)
  assert all(np.all(np.isfinite(x)) for x in held.values())
  rows = metrics(tmp_path)
  assert [row["step"] for row in rows] == [*range(1, at + 1)]
  assert [row["student/skipped"] for row in rows[:5]] == [0, 1, 1, 2, 3]
  assert [row["student/in_row"] for row in rows[:5]] == [0, 1, 0, 1, 2]
  assert [row["student/updates"] for row in rows[:5]] == [1, 1, 2, 2, 2]
  assert [row["student/loss"] == "nan" for row in rows[:5]] == [False, True, False, True, True]
  norms = [row["student/parameter_norm"] for row in rows]
  assert norms[0] == norms[1] and norms[2] == norms[3] == norms[4]
  # The rate of an update that was left out is that of the next one.
  rates = [row["student/learning_rate"] for row in rows]
  assert rates[1] == rates[2] > rates[0] and rates[3] == rates[4]
  # Without the poison it goes on.
  assert flow(tmp_path) == 0 and saved(tmp_path)[-1] == STEPS
  assert int(arrays(tmp_path, STEPS)[0]["optimizers/student/skipped"]) == 3


def test_a_full_disk_while_saving_is_told_of_and_training_goes_on(whole, tmp_path, capsys):
  save = Checkpoints.save

  def saves(self, step, items, note):
    if step != 3:
      return save(self, step, items, note)
    with files_at_most(200):
      save(self, step, items, note)
      while self._manager.is_saving_in_progress():
        pass
    return True

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Checkpoints, "save", saves)
    assert flow(tmp_path) == 0
  assert saved(tmp_path) == [i for i in range(1, STEPS + 1) if i != 3]
  words = [line for line in said(capsys) if "could not be written" in line]
  assert len(words) == 1 and "The checkpoint of step 3" in words[0] and "File too large" in words[0]
  assert words[0].endswith("the last one there is of step 2. Training goes on.")
  assert_same_arrays(arrays(tmp_path, STEPS)[0], arrays(whole[0], STEPS)[0])


def test_a_full_disk_at_the_end_is_the_exit_status(tmp_path, capsys):
  save = Checkpoints.save

  def saves(self, step, items, note):
    with files_at_most(200 if step == STEPS else 2**30):
      save(self, step, items, note)
      while self._manager.is_saving_in_progress():
        pass

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Checkpoints, "save", saves)
    assert flow(tmp_path) == 1
  assert saved(tmp_path)[-1] == STEPS - 1
  assert said(capsys)[-1].startswith(f"train: The checkpoint of step {STEPS} could not be written")
  assert flow(tmp_path) == 0 and saved(tmp_path)[-1] == STEPS


# Refusals


@pytest.mark.parametrize(
  ("more", "status", "words"),
  [
    (["--config.stage=foo"], 2, "The stage is 'foo'; choose one of vae, flow, ode, dmd, hybrid."),
    (["--config.optimizer.speed=1"], 2, "--config.optimizer.speed is no value of"),
    (["--config.batch=3"], 2, "A batch of 3 does not divide among 2 devices"),
    (["--config.batch=4", "--config.accumulate=3"], 2, "does not divide into 3 parts"),
    (["--config.compute.fsdp=3"], 2, "2 devices do not divide into groups of 3"),
    (["--config.steps=0"], 2, "steps is 0; it must be at least 1."),
    (["--config.compute.unroll=0"], 2, "compute.unroll is 0; it must be at least 1."),
    (["--config.student.weights=nowhere/at-all/x"], 1, "nowhere"),
    (["--config.student.weights=random:huge"], 1, "There is no model 'huge'"),
    (["--config.text.weights=random:tiny"], 1, "the student takes 12; bring the two that were"),
    (["--config.vae.weights=random:tiny"], 2, "latents of 4 channels, and the autoencoder in"),
    (["--config.data.path=nowhere"], 1, "There is no nowhere to read videos from; make it with"),
    (["--config.data.made=1"], 1, "There are 1 examples, and a batch takes 2"),
    (["--config.lora.rank=2", "--config.lora.targets=('x',)"], 2, "Adapters of 'x' were asked for"),
    (["--config.optimizer.schedule=fast"], 2, "There is no schedule 'fast' of learning rates"),
    (["--config.ema.decay=1.5"], 2, "The average has a decay of 1.5"),
    (["--config.flow.forcing=teacher"], 2, "flow.frames is 2; give at least 1, and with teacher"),
    (["--config.geometry.variant=odd"], 2, "odd"),
    (["--config.optimizer.kind=sgd"], 2, "no optimizer 'sgd'; choose one of adam, muon"),
    (["--config.optimizer.kind=muon", "--config.lora.rank=2"], 2, "adapters are to be trained; s"),
    (["--config=nowhere.py"], 2, "nowhere.py is not there; give a config file"),
  ],
)
def test_what_cannot_work_is_refused_in_a_sentence(tmp_path, capsys, more, status, words):
  folder = tmp_path / "run"
  assert flow(folder, *more) == status
  (line,) = said(capsys)
  assert line.startswith("train: ") and words in line and line.endswith(".")
  assert not folder.exists() or not saved(folder)


def test_data_of_another_shape_are_refused(tmp_path, capsys):
  data = videos(tmp_path / "data", frames=1)
  assert flow(tmp_path / "run", data) == 1
  assert "have 1 frames, and flow.frames is 2; give longer clips" in said(capsys)[-1]
  assert flow(tmp_path / "run", data, "--config.geometry.width=8") == 1
  assert "has the shape 1 x 4 x 6 x 4, and any x 4 x 8 x 4 is needed" in said(capsys)[-1]


def test_a_run_of_an_earlier_version_goes_on():
  """Which had fewer values to set, and others."""
  now = config.parse([*FLOW, "--workdir=unused"]).config
  before = now.to_dict()
  del before["optimizer"]["kind"], before["autoencoder"]["decoder_only"]
  before["distill"]["last_step_only"] = False
  loop._check_config(now, Path("w"), {"config": before})
  other = config.parse([*FLOW, "--workdir=unused", "--config.optimizer.kind=muon"]).config
  with pytest.raises(ConfigError, match="another config, which differs in optimizer.kind; go on"):
    loop._check_config(other, Path("w"), {"config": before})
  before["distill"]["last_step_only"] = True
  with pytest.raises(ConfigError, match="which differs in distill.last_step_only; go on"):
    loop._check_config(now, Path("w"), {"config": before})


def test_how_validation_videos_are_guided_may_change():
  argv = [f"--config={ROOT / 'configs' / 'tiny_ode.py'}", "--workdir=unused"]
  now = config.parse(argv).config
  before = now.to_dict()
  assert before["flow"].pop("guidance_interval") == (500, 1000)  # an earlier version had none
  before["flow"] |= {"guidance": 5.0, "solver_steps": 7}
  loop._check_config(now, Path("w"), {"config": before})
  before["flow"]["shift"] = 4.0
  with pytest.raises(ConfigError, match="which differs in flow.shift; go on"):
    loop._check_config(now, Path("w"), {"config": before})


def test_another_config_is_refused_and_changes_nothing(whole, capsys):
  before = (whole[0] / "config.json").read_bytes()
  assert flow(whole[0], "--config.optimizer.rate=0.5", "--config.seed=3", "--config.steps=9") == 2
  (line,) = said(capsys)
  assert "another config, which differs in optimizer.rate, seed; go on with the same" in line
  assert (whole[0] / "config.json").read_bytes() == before


def test_the_config_of_the_checkpoint_counts_whatever_lies_beside_it(whole, tmp_path, capsys):
  folder = tmp_path / "run"
  shutil.copytree(whole[0], folder)
  (folder / "config.json").write_text("{")
  assert flow(folder, "--config.flow.frames=1", "--config.steps=9") == 2
  assert "differs in flow.frames" in said(capsys)[-1]


def test_figures_of_a_run_that_left_no_checkpoint_are_forgotten(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 0.0}\n{"step": 2, "time": 0.0}\n')
  assert flow(tmp_path, "--config.steps=2") == 0
  assert [row["step"] for row in metrics(tmp_path)] == [1, 2]
  assert all("student/loss" in row for row in metrics(tmp_path))


def test_what_was_learnt_before_the_data_fail_is_kept(tmp_path, capsys):
  def fail(step, batch):
    if step == 3:
      raise DataError("Example 7 cannot be read.")

  with each_batch(fail):
    assert flow(tmp_path, "--config.checkpoint.every=100") == 1
  assert said(capsys)[-1] == "train: Example 7 cannot be read."
  assert saved(tmp_path) == [2]


@pytest.mark.parametrize(
  ("more", "words"),
  [
    ("validation.seed=-1", "validation.seed is -1"), ("seed=-1", "seed is -1"),
    ("validation.fps=100000", "validation.fps from 1 to 240"), ("checkpoint.keep=0", "keep is 0"),
    ("data.prefetch=-1", "prefetch is -1"), ("flow.guidance=-3.0", "guidance"),
    ("flow.guidance_interval=(900.0,500.0)", "give the lower first"),
    ("flow.solver_steps=0", "steps"), ("flow.shift=0.0", "shift is 0"),
    ("optimizer.eps=0.0", "eps is 0"), ("teacher.dtype=foo", "teacher.dtype is 'foo'"),
    ("init_ema=True", "init is not"), ("lora.rank=100000", "lora.rank is 100000"),
  ],
)  # fmt: skip
def test_values_that_would_fail_late_are_refused_at_once(tmp_path, capsys, more, words):
  assert flow(tmp_path / "run", f"--config.{more}") == 2
  assert words in said(capsys)[-1] and not (tmp_path / "run").exists()


def test_two_processes_do_not_train_in_one_folder(tmp_path, capsys):
  with (tmp_path / ".lock").open("a") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert flow(tmp_path) == 2
  assert said(capsys) == [
    f"train: Another process trains in {tmp_path}; wait for it, or give another --workdir."
  ]
  assert [x.name for x in tmp_path.iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_is_refused(tmp_path, capsys):
  (tmp_path / "file").write_text("kept")
  for folder, why in (("file", "File exists"), ("file/run", "Not a directory")):
    assert flow(tmp_path / folder) == 2
    words = f"{tmp_path / folder} cannot be written ({why}); give another --workdir."
    assert said(capsys) == [f"train: {words}"]
  assert (tmp_path / "file").read_text() == "kept"


# Before training


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_a_dry_run_tells_sizes_and_writes_nothing(tmp_path, capsys, rank):
  assert flow(tmp_path / "run", "--dry_run", f"--config.lora.rank={rank}") == 0
  out, error = capsys.readouterr()
  tree = jax.eval_shape(lambda: wan.init_params(SMALL, jax.random.key(0)))
  size = sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
  # Six attention matrices of [16, 16] and their like across text: rank times inputs plus outputs.
  low = rank * (8 * (16 + 16) + 2 * (16 + 16))
  assert f"  student (trained): {low if rank else size:,} parameters\n" in out
  assert (f"  student, below adapters: {size:,} parameters\n" in out) == bool(rank)
  assert f"stage flow, 2 devices, {STEPS} steps of 2 samples\n" in out
  # Weights, their average and two moments, and the base, in float32.
  held = 4 * (4 * low + size if rank else 4 * size)
  told = float(out.split("held on a device: ")[1].split(" GB")[0])
  assert abs(told - held / 1e9) < 0.01
  assert "update of the student:" in out and not error
  assert not (tmp_path / "run").exists()


def test_what_a_dry_run_compiles_is_what_training_runs(tmp_path, monkeypatch):
  """So that a cache of compiled programs has it when training begins."""
  made, programs = Stage.make, []

  class Seen:
    def __init__(self, update):
      self.update = update

    def lower(self, *args):
      lowered = self.update.lower(*args)
      programs.append(lowered.as_text())
      return lowered

    def __call__(self, *args):
      self.lower(*args)
      return self.update(*args)

  monkeypatch.setattr(Stage, "make", staticmethod(lambda *args: Seen(made(*args))))
  assert flow(tmp_path / "run", "--dry_run", "--config.steps=1") == 0
  assert flow(tmp_path / "run", "--config.steps=1") == 0
  assert len(programs) == 2 and programs[0] == programs[1]


# Adapters


def test_adapters_alone_are_trained(whole, tmp_path, capsys):
  more = [ADAPTERS, f"--config.init={whole[0]}", "--config.checkpoint.every=3"]
  base = jax.device_get(weights.load_trained(planned(*more), "student"))
  with each_batch(asks(3)):
    assert flow(tmp_path, *more) == 0
  assert flow(tmp_path, *more) == 0
  assert "Going on after step 3." in said(capsys)
  names = {k.removeprefix("student/"): k for k in arrays(tmp_path, 3)[0] if k[:8] == "student/"}
  flat = {"/".join(x.key for x in k): v for k, v in jax.tree_util.tree_leaves_with_path(base)}
  assert names.keys() == flat.keys()
  for step in (3, STEPS):
    held, note = arrays(tmp_path, step)
    assert_same_arrays({k: held[names[k]] for k in names}, flat)
    assert note["lora"]["rank"] == 2
  adapters, alpha = lora.load(tmp_path / "adapters.safetensors", SMALL)
  assert alpha == 2 and any(np.any(pair["up"]) for pair in adapters.values())
  for name, pair in adapters.items():
    for side, value in pair.items():
      np.testing.assert_array_equal(held[f"adapters/{name}/{side}"], value)
  # What others load of the run is the sum, by hand for one matrix.
  loaded = convert.load(str(tmp_path), "dit", dtype="float32").params["blocks"]
  pair = adapters["ffn_in"]
  want = base["blocks"]["ffn_in"]["kernel"] + np.einsum("lir,lro->lio", pair["down"], pair["up"])
  np.testing.assert_allclose(loaded["ffn_in"]["kernel"], want, rtol=1e-4, atol=1e-6)


def test_a_run_with_adapters_goes_on_with_them(whole, capsys):
  assert flow(whole[0], ADAPTERS) == 2
  assert "differs in lora.rank;" in said(capsys)[-1]
