"""What the README shows runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hfjax.video import read_video

ROOT = Path(__file__).resolve().parents[1]


def test_examples_run_in_order(capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
  assert len(blocks) == 3
  scope = {}
  for block in blocks:
    exec(block, scope)
  assert len(read_video("square.mp4").frames) == 69
  assert "(1, 3, 12, 20, 16) frames so far: [15]" in capsys.readouterr().out
  assert scope["video"].shape == (1, 15, 12, 20, 16)


def test_files_that_are_named_exist():
  for page in ("README.md", "WORKSPACE.md"):
    text = (ROOT / page).read_text()
    for path in re.findall(r"(?:tools|tests|benchmarks|hfjax|pallas_kernels)/[\w/]+\.\w+", text):
      assert (ROOT / path).exists(), path


def test_make_sample_calls_the_command_with_previews():
  command = ["make", "--dry-run", "--no-print-directory", "sample", "ARGS=--seed=3"]
  # As if called by hand, also where make runs the tests.
  env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
  run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=env)
  assert run.returncode == 0, run.stderr
  assert run.stdout.splitlines()[-1].endswith("/python -m hfjax.sample --preview --seed=3")


@pytest.mark.slow
def test_benchmark_runs_and_refuses_bad_sizes(tmp_path):
  def run(*args):
    return subprocess.run(
      [sys.executable, str(ROOT / "tools" / "benchmark.py"), *args],
      capture_output=True, text=True, timeout=600,
    )  # fmt: skip

  good = run("--size", "64x32", "--repeats", "1", "--out", str(tmp_path / "new" / "a.json"))
  assert good.returncode == 0, good.stderr
  assert "FPS" in good.stdout and (tmp_path / "new" / "a.json").exists()
  for size, sentence in (("72x32", "does not divide"), ("big", "give WIDTHxHEIGHT"),
                         ("100x32", "multiples of 16")):  # fmt: skip
    bad = run("--size", size)
    assert bad.returncode == 2 and sentence in bad.stderr and "Traceback" not in bad.stderr
