"""What is written, and what becomes of the target whatever happens."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from hfjax.convert import CheckpointError, checkpoint, dit, stored, write
from tests.convert.helpers import (
  HYBRID,
  ROOT,
  TENSORS,
  content,
  convert,
  flat,
  folders,
  put,
  refused,
  same,
  tensors_of,
)  # fmt: skip


def test_dtypes_that_differ_within_an_array_survive(tmp_path):
  """A stacked array takes the wider dtype, and the way back knows what each tensor was."""
  tensors = dict(TENSORS)
  for name in ("blocks.0.self_attn.k.weight", "blocks.1.ffn.0.weight", "blocks.1.ffn.0.bias"):
    tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
  put(tmp_path / "wan", tensors)
  assert convert(tmp_path / "wan", tmp_path / "ours") == 0
  ours = load_file(tmp_path / "ours" / "dit" / "model.safetensors")
  assert ours["blocks/self_attn/qkv/kernel"].dtype == np.float32
  assert convert(tmp_path / "ours", tmp_path / "back", "--to", "original") == 0
  same(load_file(tmp_path / "back" / "diffusion_pytorch_model.safetensors"), tensors)


def test_double_precision_survives_among_others(tmp_path):
  tensors = dict(TENSORS)
  tensors["blocks.0.norm3.bias"] = np.random.default_rng(0).normal(size=32)
  put(tmp_path / "wan", tensors)
  assert convert(tmp_path / "wan", tmp_path / "ours") == 0
  assert convert(tmp_path / "ours", tmp_path / "back", "--to", "original") == 0
  same(load_file(tmp_path / "back" / "diffusion_pytorch_model.safetensors"), tensors)


@pytest.mark.parametrize("dtype", [np.int32, np.bool_, np.uint8])
def test_weights_that_are_no_fractions_are_refused(tmp_path, capsys, dtype):
  put(tmp_path / "wan", {**TENSORS, "head.head.bias": np.ones(16, dtype)})
  error = refused(capsys, tmp_path / "wan", tmp_path / "ours")
  assert "holds head.head.bias as" in error and "weights are F64" in error


@pytest.mark.parametrize("to", ["hfjax", "original"])
def test_numbers_too_large_for_a_dtype_are_refused(tmp_path, capsys, to):
  put(tmp_path / "wan", {**TENSORS, "head.head.bias": np.full(16, 3.4e38, np.float32)})
  error = refused(capsys, tmp_path / "wan", tmp_path / "x", "--dtype", "bf16", "--to", to)
  assert "head.head.bias holds 16 numbers that are too large for bfloat16" in error


@pytest.mark.parametrize(("name", "dtype"), [("bf16", ml_dtypes.bfloat16), ("float32", np.float32)])
def test_dtype_on_request(tmp_path, name, dtype):
  put(tmp_path / "wan", tensors_of(dtype=np.float32 if name == "bf16" else np.float16))
  assert convert(tmp_path / "wan", tmp_path / "ours", "--dtype", name) == 0
  ours = load_file(tmp_path / "ours" / "dit" / "model.safetensors")
  assert {x.dtype for x in ours.values()} == {np.dtype(dtype)}
  want = flat(dit.from_original(HYBRID, TENSORS))
  for k in want:
    np.testing.assert_allclose(ours[k].astype(np.float32), want[k], rtol=0.01, atol=1e-3)


def test_the_record_beside_the_weights(tmp_path, capsys):
  put(tmp_path / "wan")
  assert convert(tmp_path / "wan", tmp_path / "ours") == 0
  folder = tmp_path / "ours" / "dit"
  info = json.loads((folder / "config.json").read_text())
  file = tmp_path / "wan" / "diffusion_pytorch_model.safetensors"
  assert info["origin"] == {
    "files": {file.name: file.stat().st_size}, "key": "", "averaged": False, "naming": "original",
  }  # fmt: skip
  assert stored.read_config(folder)[1] == HYBRID
  assert info["variant"] == "reference_infer"
  digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
  assert info["hashes"] == {"model.safetensors": digest}
  assert "Taken for variant reference_infer" in capsys.readouterr().out
  before = stored.folder_hash(folder)
  info["hashes"]["model.safetensors"] = digest[::-1]
  (folder / "config.json").write_text(json.dumps(info))
  assert stored.folder_hash(folder) != before
  assert folders(tmp_path) == ["ours", "wan"]


def test_shards_are_written_and_read(tmp_path, monkeypatch):
  monkeypatch.setattr(
    write.write_shards, "__defaults__", (write.write_shards.__defaults__[0], 9000)
  )
  put(tmp_path / "wan")
  assert convert(tmp_path / "wan", tmp_path / "ours") == 0
  shards = sorted(tmp_path.glob("ours/dit/model-*-of-*.safetensors"))
  assert len(shards) > 3
  info = json.loads((tmp_path / "ours" / "dit" / "config.json").read_text())
  assert info["hashes"].keys() == {s.name for s in shards}
  assert convert(tmp_path / "ours", tmp_path / "back", "--to", "original") == 0
  pieces = sorted((tmp_path / "back").glob("*.safetensors"))
  assert len(pieces) > 3
  found = {}
  for piece in pieces:
    found |= load_file(piece)
  same(found, TENSORS)
  index = tmp_path / "back" / "diffusion_pytorch_model.safetensors.index.json"
  assert set(json.loads(index.read_text())["weight_map"]) == set(TENSORS)
  pieces[1].unlink()
  with pytest.raises(CheckpointError, match="does not hold all shards"):
    checkpoint.open_parts(tmp_path / "back")


def test_existing_folders_are_kept_unless_told_otherwise(tmp_path, capsys):
  put(tmp_path / "wan")
  target = tmp_path / "ours"
  assert convert(tmp_path / "wan", target) == 0
  (target / "notes.txt").write_text("mine")
  before = (target / "dit" / "config.json").read_text()
  assert "is there already" in refused(capsys, tmp_path / "wan", target)
  assert convert(tmp_path / "wan", target, "--overwrite", "--dtype", "bf16") == 0
  assert (target / "dit" / "config.json").read_text() != before
  assert (target / "notes.txt").read_text() == "mine"  # other entries stay
  (tmp_path / "file").write_text("")
  assert "is a file" in refused(capsys, tmp_path / "wan", tmp_path / "file")
  assert folders(tmp_path) == ["file", "ours", "wan"]


def test_an_interrupted_run_leaves_the_target_as_it_was(tmp_path, monkeypatch, capsys):
  put(tmp_path / "wan")
  target = tmp_path / "ours"
  assert convert(tmp_path / "wan", target) == 0
  before = {p: p.read_bytes() for p in target.rglob("*") if p.is_file()}
  calls = []

  def interrupt(tensor, name):
    calls.append(name)
    if len(calls) > 20:
      raise KeyboardInterrupt
    return tensor.read()

  monkeypatch.setattr(checkpoint, "_read", interrupt)
  assert convert(tmp_path / "wan", target, "--overwrite", "--dtype", "bf16") == 130
  assert "as it was" in capsys.readouterr().err
  assert {p: p.read_bytes() for p in target.rglob("*") if p.is_file()} == before
  assert folders(tmp_path) == ["ours", "wan"]


SLOW = """
import sys, time, runpy
from hfjax.convert import write
plain = write.write_shards
def wait(*args, **kwargs):
  print("writing", flush=True)
  time.sleep(60)
write.write_shards = wait
tool = sys.argv.pop(1)
runpy.run_path(tool, run_name="__main__")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGKILL"])
def test_a_process_that_is_asked_to_end_leaves_nothing_behind(tmp_path, capsys, name):
  put(tmp_path / "wan")
  run = subprocess.Popen(
    [sys.executable, "-c", SLOW, ROOT / "tools" / "convert_checkpoint.py", tmp_path / "wan",
     tmp_path / "ours", "--quiet"],
    cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  while "writing" not in (line := run.stdout.readline()):
    assert line, run.stderr.read()
  assert "Another conversion is writing" in refused(capsys, tmp_path / "wan", tmp_path / "ours")
  run.send_signal(getattr(signal, name))
  _, error = run.communicate(timeout=60)
  if name == "SIGKILL":
    # What it leaves does not hinder the next run, which removes it.
    assert folders(tmp_path) == [".ours.converting", "wan"]
    assert convert(tmp_path / "wan", tmp_path / "ours") == 0
    assert folders(tmp_path) == ["ours", "wan"]
  else:
    assert run.returncode == 130 and "as it was" in error, error
    assert folders(tmp_path) == ["wan"]


def test_output_that_nobody_reads_is_no_error(tmp_path):
  put(tmp_path / "wan")
  tool = [sys.executable, ROOT / "tools" / "convert_checkpoint.py"]
  reader, writer = os.pipe()
  os.close(reader)
  run = subprocess.run(
    [*tool, tmp_path / "wan", tmp_path / "ours", "--quiet"],
    cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=100,
  )  # fmt: skip
  os.close(writer)
  assert run.stderr == "" and run.returncode == 141


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch, capsys):
  put(tmp_path / "wan")
  usage = type("Usage", (), {"free": 1000})
  monkeypatch.setattr(write.shutil, "disk_usage", lambda path: usage)
  assert "0.00 GB are free; make room" in refused(capsys, tmp_path / "wan", tmp_path / "ours")
  assert folders(tmp_path) == ["wan"]


def test_odd_content_of_a_target_stays(tmp_path, capsys):
  put(tmp_path / "wan")
  target = tmp_path / "ours"
  (target / "sub").mkdir(parents=True)
  target.chmod(0o700)
  (target / "broken").symlink_to("/nowhere")
  (target / "sub" / "up").symlink_to("..")
  os.mkfifo(target / "pipe")
  (tmp_path / "link").symlink_to(target)
  assert convert(tmp_path / "wan", tmp_path / "link", "--overwrite") == 0, capsys.readouterr().err
  assert folders(target) == ["broken", "dit", "pipe", "sub"]
  assert (tmp_path / "link").is_symlink() and target.stat().st_mode & 0o777 == 0o700


def test_targets_that_would_harm_are_refused(tmp_path, monkeypatch, capsys):
  put(tmp_path / "a" / "wan")
  (tmp_path / "a" / "wan" / "inner").mkdir()
  (tmp_path / "a" / "dangling").symlink_to(tmp_path / "none")
  (tmp_path / "a" / "loop").symlink_to(tmp_path / "a" / "loop")
  monkeypatch.chdir(tmp_path / "a")
  before = content(tmp_path)
  for target, sentence in (
    (".", "working directory or a folder above"), ("..", "working directory or a folder above"),
    ("wan", "lie one within the other"), ("wan/inner", "lie one within the other"),
    ("dangling", "a link to nothing"), ("loop", "cannot be written"), ("x" * 300, "too long"),
    ("wan/config.json/x", "cannot be written"), ("a\0b", "is no path"),
  ):  # fmt: skip
    assert sentence in refused(capsys, "wan", target, "--overwrite")
  with pytest.raises(CheckpointError, match="working directory or a folder above"):
    write._check_target(Path("/"), Path("wan"))
  assert content(tmp_path) == before
  assert convert("wan", "y" * 250) == 0


def test_targets_are_checked_before_anything_is_read(tmp_path, capsys):
  (tmp_path / "ours").mkdir()
  assert "is there already" in refused(capsys, tmp_path / "no source", tmp_path / "ours")


def test_parents_that_were_made_in_vain_are_removed(tmp_path, capsys):
  refused(capsys, tmp_path / "no source", tmp_path / "a" / "b" / "c")
  assert folders(tmp_path) == []


def test_what_the_system_refuses_is_a_sentence(tmp_path, monkeypatch, capsys):
  put(tmp_path / "wan")

  def full(*args):
    raise OSError(28, "No space left on device", "model.safetensors")

  monkeypatch.setattr(write, "_write_file", full)
  error = refused(capsys, tmp_path / "wan", tmp_path / "ours")
  assert "No space left on device (model.safetensors); mend that" in error
  assert folders(tmp_path) == ["wan"]


@pytest.mark.parametrize(
  ("there", "to", "refuses"),
  [("original", "diffusers", True), ("diffusers", "original", True), ("hfjax", "original", True),
   ("original", "original", False), ("original", "hfjax", False)],
)  # fmt: skip
def test_layouts_are_not_mixed(tmp_path, capsys, there, to, refuses):
  put(tmp_path / "wan")
  assert convert(tmp_path / "wan", tmp_path / "out", "--to", there) == 0
  args = (tmp_path / "wan", tmp_path / "out", "--overwrite", "--to", to)
  if refuses:
    assert f"in the layout {there}, beside which {to}" in refused(capsys, *args)
  else:
    assert convert(*args) == 0
