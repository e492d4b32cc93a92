"""The whole chain of the shapes world's model, with next to no training."""

import dataclasses
import json
import os
import signal
import threading
import time

import make_tiny
import numpy as np
import pytest

from hfjax import pipeline
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


def test_a_step_that_fails_or_has_no_time_left_is_told_of(tmp_path, capsys):
  argv = ["--smoke", "--quiet", "--work", str(tmp_path), "--only", "clips"]
  assert make_tiny.main(argv) == 1
  assert "encode_videos ended with status 2; the same command goes on." in capsys.readouterr().err
  assert make_tiny.main([*argv, "--minutes", "1e-9"]) == 1
  assert "The time is over before encode_videos" in capsys.readouterr().err


SPY = """
import json, os, sys, time
name = "-".join(sys.argv[2:]).replace("/", "of") or "alone"
names = "CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_MEM_FRACTION"
with open(os.path.join(sys.argv[1], name), "w") as file:
  json.dump([os.environ.get(x) for x in names], file)
import hfjax
if "--slow" in sys.argv:
  time.sleep(60)
sys.exit(3 if sys.argv[-1] == "1/3" else 0)
"""


def test_processes_share_work_and_devices(tmp_path, monkeypatch):
  monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
  monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
  monkeypatch.chdir(tmp_path)
  spy, seen = tmp_path / "spy.py", tmp_path / "seen"
  spy.write_text(SPY)
  seen.mkdir()
  assert make_tiny._apart([str(spy)], ["seen"]) == 0
  assert make_tiny._apart([str(spy)], ["seen", "--one"], devices=2) == 0
  assert make_tiny._apart([str(spy)], ["seen"], devices=2, count=3) == 3
  assert {p.name: json.loads(p.read_text()) for p in seen.iterdir()} == {
    "alone": [None, None],
    "--one": ["0", "0.90"],
    "--process-0of3": ["0", "0.60"],
    "--process-1of3": ["1", "0.60"],
    "--process-2of3": ["0", "0.60"],
  }


def test_processes_are_stopped_with_the_chain(tmp_path):
  spy = tmp_path / "spy.py"
  spy.write_text(SPY)
  before = signal.getsignal(signal.SIGTERM)
  timer = threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM))
  timer.start()
  begin = time.monotonic()
  assert make_tiny._apart([str(spy)], [str(tmp_path), "--slow"], devices=2, count=2) != 0
  assert time.monotonic() - begin < 30
  assert signal.getsignal(signal.SIGTERM) == before


def test_a_tool_that_fails_in_a_process_of_its_own_is_told_of(tmp_path, capfd):
  argv = ["--smoke", "--quiet", "--work", str(tmp_path), "--only", "clips", "--devices", "2"]
  assert make_tiny.main(argv) == 1
  said = capfd.readouterr().err
  assert "encode_videos: " in said and "vae_long is neither a file or folder" in said
  assert said.splitlines()[-1].startswith("make_tiny: encode_videos ended with status 2")
  for flags in (["--devices", "0"], ["--processes", "0"]):
    with pytest.raises(SystemExit):
      make_tiny.main(flags)
    assert "give 1 or more of each." in capfd.readouterr().err
