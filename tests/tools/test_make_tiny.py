"""The whole chain of the shapes world's model, with next to no training."""

import dataclasses
import json
import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import make_tiny
import numpy as np
import pytest
import score_shapes

from hfjax import pipeline
from hfjax.data import shapes, shards
from hfjax.models import presets, umt5
from hfjax.streaming import Stream

KEYS = {
  "vae_psnr_db", "teacher_accuracy", "stage1_accuracy_5s", "student_accuracy_5s", "device", "jax",
  "commit", "command",
}  # fmt: skip
TRANSFORMER = {"dim": 32, "ffn_dim": 48, "heads": 2, "layers": 2, "text_dim": 12}
TEXT = {"dim": 12, "dim_attn": 16, "dim_ffn": 24, "heads": 2, "layers": 2}


@pytest.fixture
def narrow(monkeypatch):
  """The networks of the shapes world, narrower: what they read and write keeps its shapes."""
  change = lambda holder, fields: dataclasses.replace(holder["shapes"], **fields)
  monkeypatch.setitem(presets.PRESETS, "shapes", change(presets.PRESETS, TRANSFORMER))
  monkeypatch.setitem(umt5.PRESETS, "shapes", change(umt5.PRESETS, TEXT))
  monkeypatch.setattr(
    pipeline, "SHAPES_VAE", dataclasses.replace(pipeline.SHAPES_VAE, dim=4, dim_mult=(1, 1, 1, 1))
  )


# One test, as several might be given to workers that would each make the chain.
@pytest.mark.slow
def test_the_chain_makes_a_model_that_streams_and_is_told_of(narrow, tmp_path, capsys):
  argv = ["--smoke", "--quiet", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"),
          "--assets", str(tmp_path / "assets"), "--commit", "none"]  # fmt: skip
  assert make_tiny.main(argv) == 0, capsys.readouterr().err
  check_model(tmp_path / "assets")
  check_figures_logs_and_pictures(tmp_path / "out")
  capsys.readouterr()
  # What is done is not done again.
  before = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("*.safetensors")}
  steps = [name for name in make_tiny.STEPS if name not in ("pack", "score", "report")]
  assert make_tiny.main([*argv, "--only", *steps]) == 0
  assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("*.safetensors")}
  assert before and "training" not in capsys.readouterr().err


def check_model(folder):
  model = pipeline.load(folder, dtype="float32")
  assert model.preset == "shapes" and model.variant == "paper" and model.config.linear
  frames = np.asarray(next(Stream(model, "a red circle moves left", seed=0)))
  assert frames.shape == (1, 9, 128, 128, 3) and frames.dtype == np.uint8


def check_figures_logs_and_pictures(out):
  figures = json.loads((out / "results.json").read_text())
  assert figures.keys() >= KEYS
  assert all(0 <= v <= 1 for k, v in figures.items() if "accuracy" in k)
  details = json.loads((out / "details" / "student_accuracy_5s.json").read_text())
  assert details["low"] <= details["accuracy"] == figures["student_accuracy_5s"] <= details["high"]
  assert {p.stem for p in (out / "logs").glob("*.jsonl")} == set(make_tiny.TRAINED)
  for name in ("curves.png", "accuracy.png", "sheets/student_accuracy_5s-00.png"):
    assert (out / name).stat().st_size > 1000


def test_flags_that_would_do_nothing_are_not_scored_by(capsys):
  argv = ["--weights", str(pipeline.EMBEDDED), "--name", "x", "--prompts", "1", "--steps", "50"]
  assert score_shapes.main([*argv, "--shift", "5"]) == 2
  preset = pipeline.recorded_preset(pipeline.EMBEDDED)
  words = f"--steps, --shift would do nothing for weights of the preset {preset}; leave it out."
  assert words in capsys.readouterr().err


def test_the_ends_of_trajectories_are_scored_by_their_captions(tmp_path, capsys):
  clips = shapes.Shapes("train", 3, 0, 41)
  autoencoder = pipeline.load_autoencoder(pipeline.EMBEDDED, "full", "float32")
  latents = np.asarray(autoencoder.encode(np.stack([clips.video(i) for i in range(3)])))
  prompts = [clips.prompt(0), clips.prompt(1), clips.prompt(0)]  # the last one is of another clip
  plan = shards.Plan("trajectories", 3, {"trajectory": ((2, *latents.shape[1:]), "float16")}, {})
  examples = lambda start, stop, reject: (
    {"prompt": prompts[i], "trajectory": np.stack([np.zeros_like(latents[i]), latents[i]])}
    for i in range(start, stop)
  )
  shards.write(tmp_path / "data", plan, examples)
  argv = ["--weights", str(pipeline.EMBEDDED), "--name", "taught", "--batch", "2", "--quiet",
          "--trajectories", str(tmp_path / "data"), "--dtype", "float32", "--workers", "1",
          "--out", str(tmp_path / "results.json")]  # fmt: skip
  assert score_shapes.main(argv) == 0
  details = json.loads((tmp_path / "details" / "taught.json").read_text())
  assert details["videos"] == 3 and np.isclose(details["accuracy"], 2 / 3)
  assert score_shapes.main([*argv, "--window", "3"]) == 2
  assert "--window would do nothing where no model makes videos" in capsys.readouterr().err
  for more in (["--at", "5", "60"], ["--at", "60"], ["--frames", "33"]):
    assert score_shapes.main([*argv, *more]) == 2
    assert f"as they are; leave out {more[0]}" in capsys.readouterr().err
  assert score_shapes.main([*argv, "--vae"]) == 2
  assert "give one of --vae, --truth and --trajectories" in capsys.readouterr().err
  assert score_shapes.main([*argv[:-1], "x.json", "--trajectories", "nowhere"]) == 2
  assert "There is no nowhere to read trajectories from" in capsys.readouterr().err


def test_a_step_that_fails_or_has_no_time_left_is_told_of(tmp_path, capsys):
  argv = ["--smoke", "--quiet", "--work", str(tmp_path), "--only", "clips"]
  assert make_tiny.main(argv) == 1
  assert "encode_videos ended with status 2; the same command goes on." in capsys.readouterr().err
  assert make_tiny.main([*argv, "--minutes", "1e-9"]) == 1
  assert "The time is over before encode_videos" in capsys.readouterr().err


SPY = """
import json, os, signal, sys, time
name = "-".join(sys.argv[2:]).replace("/", "of") or "alone"
import hfjax

def save(number, frame):
  time.sleep(1)
  with open(os.path.join(sys.argv[1], f"saved{number}-{name}"), "w"):
    sys.exit(128 + number)

signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
names = "CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_MEM_FRACTION"
with open(os.path.join(sys.argv[1], name), "w") as file:
  json.dump([os.environ.get(x) for x in names], file)
if "--slow" in sys.argv:
  time.sleep(60)
sys.exit(3 if sys.argv[-1] == "1/3" else 0)
"""


def parts(count):
  return [["--process", f"{i}/{count}"] for i in range(count)]


@pytest.fixture
def spy(tmp_path):
  path = tmp_path / "spy.py"
  path.write_text(SPY)
  return [str(path)]


def test_processes_share_work_and_devices(spy, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
  seen = tmp_path / "seen"
  seen.mkdir()
  assert make_tiny._apart([[*spy, "seen"]], ["4,7"]) == 0
  assert make_tiny._apart([[*spy, "seen", *part] for part in parts(3)], ["4", "7", "4"]) == 3
  monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")
  assert make_tiny._apart([[*spy, "seen", "--less"]], ["2"]) == 0
  assert {p.name: json.loads(p.read_text()) for p in seen.iterdir()} == {
    "--less": ["2", "0.60"],
    "alone": ["4,7", "0.90"],
    "--process-0of3": ["4", "0.45"],
    "--process-1of3": ["7", "0.45"],
    "--process-2of3": ["4", "0.45"],
  }


LANES = """
import os, sys, time
folder, number = sys.argv[1:]
place = os.path.join(folder, "in-" + os.environ["CUDA_VISIBLE_DEVICES"])
os.mkdir(place)  # fails if another process is there
time.sleep(0.3)
os.rmdir(place)
open(os.path.join(folder, "done-" + number), "w").close()
"""


def test_a_place_takes_one_process_after_the_other(tmp_path):
  (tmp_path / "lanes.py").write_text(LANES)
  commands = [[str(tmp_path / "lanes.py"), str(tmp_path), str(i)] for i in range(5)]
  assert make_tiny._apart(commands, ["0", "1"]) == 0
  assert sorted(p.name for p in tmp_path.glob("done-*")) == [f"done-{i}" for i in range(5)]
  assert make_tiny._apart(commands[:2], ["0", "0"]) != 0  # two at once, if that is asked for


def test_one_that_fails_does_not_keep_others_from_their_work(tmp_path):
  (tmp_path / "lanes.py").write_text(LANES)
  commands = [[str(tmp_path / "lanes.py"), str(tmp_path), str(i)] for i in range(3)]
  assert make_tiny._apart([["-c", "import sys; sys.exit(5)"], *commands], ["0"]) == 5
  assert sorted(p.name for p in tmp_path.glob("done-*")) == [f"done-{i}" for i in range(3)]


def test_figures_of_commands_at_the_same_time_are_all_kept(tmp_path, monkeypatch):
  path, write = tmp_path / "out" / "results.json", score_shapes.write

  def slowly(path, value):  # so that each would read before the others have written
    time.sleep(0.05)
    write(path, value)

  monkeypatch.setattr(score_shapes, "write", slowly)
  add = lambda i: score_shapes.add(path, {f"figure{i}": i}, {"jax": "1", "command": f"command {i}"})
  with ThreadPoolExecutor(6) as pool:
    list(pool.map(add, range(6)))
  found = json.loads(path.read_text())
  assert sorted(found.pop("command").split("; ")) == [f"command {i}" for i in range(6)]
  assert found == {"jax": "1", **{f"figure{i}": i for i in range(6)}}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on_once_and_children_save(spy, tmp_path, number):
  before = signal.getsignal(number)

  def ask():  # when both have begun
    while len([p for p in tmp_path.iterdir() if p.name.startswith("--slow")]) < 2:
      time.sleep(0.05)
    os.kill(os.getpid(), number)

  asks = threading.Thread(target=ask)
  asks.start()
  commands = [[*spy, str(tmp_path), "--slow", *part] for part in parts(2)]
  status = make_tiny._apart(commands, ["0", "1"])
  asks.join()
  assert status == 128 + number and signal.getsignal(number) == before
  assert sorted(p.name for p in tmp_path.glob("saved*")) == [
    f"saved{int(number)}---slow---process-{i}of2" for i in range(2)
  ]


def test_processes_that_were_not_begun_any_more_are_no_success(spy, tmp_path, monkeypatch):
  begin = subprocess.Popen

  def begin_and_ask(*args, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    return begin([*args[0][:1], "-c", "pass"], **options)

  monkeypatch.setattr(subprocess, "Popen", begin_and_ask)
  # The first may have ended by the signal, or before it came.
  commands = [[*spy, str(tmp_path)]] * 5
  assert make_tiny._apart(commands, ["0", "1"]) in (-signal.SIGTERM, 128 + signal.SIGTERM)


@pytest.mark.parametrize(
  ("flags", "seen", "places"),
  [
    (["--devices", "2"], "", ["0", "1"]),
    (["--devices", "2", "--processes", "3"], "3,5,6", ["3", "5", "3"]),
    (["--processes", "2"], "6", ["6", "6"]),
  ],
)
def test_who_runs_where(tmp_path, monkeypatch, capsys, flags, seen, places):
  asked = []
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
  monkeypatch.setattr(
    make_tiny, "_apart", lambda commands, places: asked.append((commands, places)) or 7
  )
  steps = ("clips", "vae", "ode", "trajectories", "pack")
  for step in steps:
    (tmp_path / "weights").mkdir(exist_ok=True)
    assert make_tiny.main(["--smoke", "--work", str(tmp_path), "--only", step, *flags]) == 1
    assert "ended with status 7; the same command goes on." in capsys.readouterr().err
  shared = places if "--processes" in flags else places[:1]
  every = ",".join(dict.fromkeys(places))
  assert [x[1] for x in asked] == [shared, places[:1], [every], shared, places[:1]]
  first = [x[0][0][1] if x[0][0][0] == "-m" else Path(x[0][0][0]).stem for x in asked]
  assert first == [
    "encode_videos", "hfjax.train", "hfjax.train", "make_trajectories", "convert_checkpoint",
  ]  # fmt: skip
  assert [len(x[0]) for x in asked] == [len(shared), 1, 1, len(shared), 1]
  # Scores are made side by side, and some of them if that is asked for.
  asked.clear()
  argv = ["--smoke", "--work", str(tmp_path), "--only", "score", *flags]
  for more, count in ((["--scores", "judge_accuracy", "stage1_accuracy"], 2), ([], 7)):
    assert make_tiny.main([*argv, *more]) == 1
    commands, where = asked.pop()
    assert len(commands) == count and where == places[: len(set(places))]


def test_a_tool_that_fails_in_a_process_of_its_own_is_told_of(tmp_path, capfd, monkeypatch):
  argv = ["--smoke", "--quiet", "--work", str(tmp_path), "--only", "clips", "--devices", "2"]
  assert make_tiny.main(argv) == 1
  said = capfd.readouterr().err
  assert "encode_videos: " in said and "vae_long is neither a file or folder" in said
  assert said.splitlines()[-1].startswith("make_tiny: encode_videos ended with status 2")
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
  for flags, words in (
    (["--devices", "0"], "--devices is 0; give 1 or more."),
    (["--processes", "0"], "--processes is 0; give 1 or more."),
    (["--clips", "-3"], "--clips is -3; give 1 or more."),
    (["--trajectories", "0"], "--trajectories is 0; give 1 or more."),
    (["--scores", "beauty"], "invalid choice: 'beauty'"),
    (
      ["--devices", "2"],
      "2 devices are asked for, and CUDA_VISIBLE_DEVICES names 1; give as many.",
    ),
  ):
    with pytest.raises(SystemExit):
      make_tiny.main(flags)
    assert words in " ".join(capfd.readouterr().err.split())
