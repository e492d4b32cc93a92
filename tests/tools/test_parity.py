"""The parity tool on the goldens kept here, and on folders it must not accept."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests" / "goldens"
# Rows that each file must yield, so that a row that silently goes missing is seen.
ROWS = {
  "schedule": 14,
  "embeddings": 17,
  "block_sparse": 15,
  "wan_bidirectional": 11,
  "causal_dense_rollout": 5,
  "hybrid_infer_rollout": 7,
  "hybrid_train_rollout": 21,
  "dmd": 93,
  "umt5": 5,
  "vae": 5,
}


def parity(*args):
  """The tool in this process, as a command of its own spends most of its time on imports."""
  import parity as tool

  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    status = tool.main([*map(str, args)])
  return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


def command(*args):
  return subprocess.run(
    [sys.executable, str(ROOT / "tools" / "parity.py"), *map(str, args)],
    capture_output=True, text=True, timeout=600,
  )  # fmt: skip


def rows(output):
  """(case, array, error, allowed, verdict); verdicts may have a space."""
  return [line.split(None, 4) for line in output.splitlines()]


@pytest.mark.parametrize("case", ROWS)
def test_every_row_is_ok(case):
  run = parity(GOLDENS, "--case", case)
  assert run.returncode == 0, run.stdout + run.stderr
  table = rows(run.stdout)
  assert len(table) == ROWS[case]
  for name, array, error, allowed, verdict in table:
    assert name == case
    if verdict == "ok":
      assert float(error) <= float(allowed)
    else:
      assert verdict == "information" and array.rpartition("/")[2] in (
        "min_topk_margin", "kept_fraction", "cache_local_global_end")  # fmt: skip


def altered(tmp_path, case, change):
  """A folder with one golden file, changed."""
  with np.load(GOLDENS / f"{case}.npz") as file:
    arrays = {k: file[k] for k in file.files}
  change(arrays)
  np.savez(tmp_path / f"{case}.npz", **arrays)
  return tmp_path


def nudge(key, by):
  def change(arrays):
    array = arrays[key].copy()
    array.flat[array.size // 2] += by
    arrays[key] = array

  return change


@pytest.mark.parametrize(
  ("case", "key", "by"),
  [
    ("schedule", "out/shift5/few_states", 1e-5),
    ("schedule", "out/shift5/timestep_id", 1),
    ("embeddings", "out/rope1_start7", 3e-5),
    ("block_sparse", "out/ragged/ratio0.5/bsld/lut_sorted", 1),
    ("block_sparse", "out/ragged/ratio0.5/bsld/dk", float("nan")),
    ("schedule", "out/shift5/noisy", float("inf")),
    # Three times what is allowed.
    ("wan_bidirectional", "out/b2/flow", 6e-5),
    ("hybrid_infer_rollout", "out/flow", 1.5e-4),
    ("hybrid_infer_rollout", "out/linear_kmean", 6e-5),
  ],
)
def test_a_changed_number_fails_its_row_and_no_other(tmp_path, case, key, by):
  run = parity(altered(tmp_path, case, nudge(key, by)))
  assert run.returncode == 1
  failed = [r[1] for r in rows(run.stdout) if r[4] == "FAIL"]
  assert failed == [key.removeprefix("out/")]


def test_outputs_nobody_asked_for_are_not_covered(tmp_path):
  run = parity(altered(tmp_path, "schedule", lambda a: a.update({"out/shift5/new": np.ones(3)})))
  assert run.returncode == 0
  assert next(r for r in rows(run.stdout) if r[1] == "shift5/new")[4] == "not covered"


def test_other_cases_are_listed_and_never_ok(tmp_path):
  np.savez(tmp_path / "other.npz", cfg=json.dumps({}))
  shutil.copy(GOLDENS / "schedule.npz", tmp_path / "schedule.npz")
  run = parity(tmp_path)
  assert run.returncode == 0
  assert [r[4] for r in rows(run.stdout) if r[0] == "other"] == ["not covered"]


@pytest.mark.parametrize(
  ("make", "args", "sentence"),
  [
    (lambda d: None, [], "holds no golden files"),
    (lambda d: (d / "schedule.npz").write_bytes(b"PK\x03\x04 no archive"), [], "can be read"),
    (lambda d: (d / "schedule.npz").write_bytes(b""), [], "can be read"),
    (lambda d: np.savez(d / "schedule.npz", a=1), [], "can be read"),
    (lambda d: np.savez(d / "schedule.npz", cfg="{"), [], "can be read"),
    (lambda d: np.savez(d / "schedule.npz", cfg="{}"), [], "lacks shifts in cfg"),
    (lambda d: np.savez(d / "schedule.npz", cfg='{"shifts": 5}'), [], "be rebuilt .* .TypeE"),
    (lambda d: np.savez(d / "schedule.npz", cfg='{"shifts": []}'), [], "holds no output that its"),
    (lambda d: np.savez(d / "schedule.npz", cfg='[5]'), [], "can be read|cannot be rebuilt"),
    (lambda d: altered(d, "schedule", lambda a: a.pop("in/shift5/t")), [], "lacks the array in/s"),
    (lambda d: altered(d, "schedule", lambda a: a.update({"out/shift5/noisy": np.ones(3)})), [],
     "of shape"),
    (lambda d: altered(d, "wan_bidirectional", lambda a: a.pop("param/head.head.bias")), [],
     "1 missing tensor: head.head.bias"),
    (lambda d: altered(d, "schedule", lambda a: None), ["--case", "dmd"],
     "no case 'dmd' in .*; it holds schedule"),
  ],
)  # fmt: skip
def test_unreadable_folders_get_a_sentence(tmp_path, make, args, sentence):
  make(tmp_path)
  run = parity(tmp_path, *args)
  assert run.returncode == 2
  assert "Traceback" not in run.stderr
  assert len(run.stderr.strip().splitlines()) == 1
  assert re.search(sentence, run.stderr), run.stderr


def test_the_command_says_so_too(tmp_path):
  run = command(tmp_path / "none")
  assert run.returncode == 2 and "is no folder" in run.stderr
  run = command(GOLDENS, "--case", "schedule")
  assert run.returncode == 0 and len(rows(run.stdout)) == ROWS["schedule"]
