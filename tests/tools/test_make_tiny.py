"""The whole chain of the shapes world's model, with next to no training."""

import dataclasses
import json

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
