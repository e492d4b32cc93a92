"""The whole chain of the shapes world's model, with next to no training."""

import json
from pathlib import Path

import make_tiny
import numpy as np
import pytest

from hfjax import pipeline
from hfjax.streaming import Stream

KEYS = {
  "vae_psnr_db", "teacher_accuracy", "stage1_accuracy_5s", "student_accuracy_5s", "device", "jax",
  "commit", "command",
}  # fmt: skip


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> tuple[Path, list[str]]:
  folder = tmp_path_factory.mktemp("tiny")
  argv = ["--smoke", "--quiet", "--work", str(folder / "work"), "--out", str(folder / "out"),
          "--assets", str(folder / "assets"), "--commit", "none"]  # fmt: skip
  assert make_tiny.main(argv) == 0
  return folder, argv


@pytest.mark.slow
def test_the_chain_makes_a_model_that_streams(chain):
  folder, _ = chain
  model = pipeline.load(folder / "assets", dtype="float32")
  assert model.preset == "shapes" and model.variant == "paper" and model.config.linear
  frames = np.asarray(next(Stream(model, "a red circle moves left", seed=0)))
  assert frames.shape == (1, 9, 128, 128, 3) and frames.dtype == np.uint8


@pytest.mark.slow
def test_figures_logs_and_pictures_of_every_stage_are_there(chain):
  out = chain[0] / "out"
  figures = json.loads((out / "results.json").read_text())
  assert figures.keys() >= KEYS
  assert all(0 <= v <= 1 for k, v in figures.items() if "accuracy" in k)
  details = json.loads((out / "details" / "student_accuracy_5s.json").read_text())
  assert details["low"] <= details["accuracy"] == figures["student_accuracy_5s"] <= details["high"]
  assert {p.stem for p in (out / "logs").glob("*.jsonl")} == set(make_tiny.TRAINED)
  for name in ("curves.png", "accuracy.png", "sheets/student_accuracy_5s-00.png"):
    assert (out / name).stat().st_size > 1000


@pytest.mark.slow
def test_what_is_done_is_not_done_again(chain, capsys):
  folder, argv = chain
  before = {p: p.stat().st_mtime_ns for p in (folder / "work").rglob("*.safetensors")}
  steps = [name for name in make_tiny.STEPS if name not in ("pack", "score", "report")]
  assert make_tiny.main([*argv, "--only", *steps]) == 0
  assert before == {p: p.stat().st_mtime_ns for p in (folder / "work").rglob("*.safetensors")}
  assert "training" not in capsys.readouterr().err


def test_a_step_that_fails_or_has_no_time_left_is_told_of(tmp_path, capsys):
  argv = ["--smoke", "--quiet", "--work", str(tmp_path), "--only", "clips"]
  assert make_tiny.main(argv) == 1
  assert "encode_videos ended with status 2; the same command goes on." in capsys.readouterr().err
  assert make_tiny.main([*argv, "--minutes", "1e-9"]) == 1
  assert "The time is over before encode_videos" in capsys.readouterr().err
