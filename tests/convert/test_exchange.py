"""Exchanges within a folder that is there, interrupted, killed, and at the same time."""

import fcntl
import os
import shutil
from pathlib import Path

import pytest

from hfjax.convert import CheckpointError, checkpoint, load, stored, write
from tests.convert.helpers import content, convert, folders, put, refused


def fill(folder, text):
  for name in ("dit/model.safetensors", "google/umt5-xxl/spiece.model", "config.json"):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
  (folder / f"big-{text}.safetensors").write_text(text)
  (folder / f"big-{text}.safetensors").rename(folder / f"big{BIG[text]}")


BIG = {"old": ".safetensors", "new": "-00001-of-00001.safetensors"}


def exchange(parent):
  with write.replace_folder(parent / "target", True, parent / "source") as new:
    fill(new, "new")


@pytest.fixture
def target(tmp_path):
  folder = tmp_path / "target"
  fill(folder, "old")
  for name in ("notes", "google/other/x", "big.safetensors.index.json", "dit/stale"):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("mine")
  return folder


def test_only_what_is_written_is_exchanged(tmp_path, target):
  exchange(tmp_path)
  after = content(target)
  assert after["notes"] == after["google/other/x"] == b"mine"
  assert after["google/umt5-xxl/spiece.model"] == after["config.json"] == b"new"
  assert {n for n in after if n.startswith(("big", "dit/", "."))} == {
    "dit/model.safetensors", "big-00001-of-00001.safetensors",
  }  # fmt: skip
  assert folders(tmp_path) == ["target"]


def interrupt_renames(monkeypatch, number, act):
  """Lets the rename of that number, and no other, be followed by `act`."""
  plain, count = Path.rename, []

  def rename(self, to):
    done = plain(self, to)
    count.append(to)
    if len(count) == number:
      act()
    return done

  monkeypatch.setattr(Path, "rename", rename)


def raising(error):
  def act():
    raise error

  return act


RENAMES = 1 + 5 + 1 + 4  # of `fill`, out, the mark that all is out, in


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("number", range(2, RENAMES + 1))
def test_an_exchange_is_complete_or_undone(tmp_path, target, monkeypatch, number, error):
  before = content(target)
  with monkeypatch.context() as m, pytest.raises(type(error)):
    interrupt_renames(m, number, raising(error))
    exchange(tmp_path)
  got = content(target)
  if number < RENAMES - 4:
    assert got == before
  elif isinstance(error, KeyboardInterrupt):
    assert got["config.json"] == b"new" and got["dit/model.safetensors"] == b"new"
  exchange(tmp_path)  # also where an error came while all was being put in
  assert content(target)["config.json"] == b"new"
  assert not [n for n in content(target) if n.startswith(".")]


def kill_exchange(parent, monkeypatch, number, run=exchange):
  """What is left by a process that is killed after the rename of that number."""

  class Killed(BaseException):
    pass

  def kill():
    m.setattr(write, "_settle", lambda place: None)
    raise Killed

  with monkeypatch.context() as m, pytest.raises(Killed):
    interrupt_renames(m, number, kill)
    run(parent)


@pytest.mark.parametrize("number", range(2, RENAMES + 1))
def test_the_next_run_ends_the_exchange_of_a_killed_one(tmp_path, target, monkeypatch, number):
  before = content(target)
  kill_exchange(tmp_path, monkeypatch, number)
  assert ".target.converting" in folders(target)
  with pytest.raises(KeyError), write.replace_folder(target, True, tmp_path / "source"):
    raise KeyError
  after = content(target)
  if number < RENAMES - 4:
    assert after == before
  else:
    assert after["config.json"] == after["dit/model.safetensors"] == b"new"
    assert "big.safetensors" not in after and after["notes"] == b"mine"
  assert not [n for n in after if n.startswith(".")]


@pytest.mark.parametrize("number", [3, RENAMES - 4, RENAMES - 1])
def test_a_cut_exchange_is_not_read_as_if_whole(tmp_path, target, monkeypatch, capsys, number):
  put(tmp_path / "wan")
  kill_exchange(tmp_path, monkeypatch, number)
  (tmp_path / "link").symlink_to(target / "dit")
  for path in (target, target / "dit", target / "dit" / "model.safetensors", tmp_path / "link"):
    for read in (checkpoint.open_parts, stored.hfjax_models, load):
      with pytest.raises(CheckpointError, match=r"target is not whole.* again with --overwrite"):
        read(path)
  assert "target is not whole" in refused(capsys, target, tmp_path / "out")
  # A copy by another name is no less cut, and is mended too.
  copy = tmp_path / "copy"
  shutil.copytree(target, copy, symlinks=True)
  for folder in (target, copy):
    # The next run mends the folder even if it then does nothing else.
    assert "is there already" in refused(capsys, tmp_path / "wan", folder)
    write.check_whole(folder)
    assert not [n for n in folders(folder) if n.startswith(".")]


def test_running_it_again_mends_a_cut_exchange(tmp_path, monkeypatch):
  put(tmp_path / "wan")
  args = (tmp_path / "wan", tmp_path / "ours")
  assert convert(*args) == 0
  kill_exchange(tmp_path, monkeypatch, 2, lambda parent: convert(*args, "--overwrite"))
  with pytest.raises(CheckpointError, match="ours is not whole"):
    load(tmp_path / "ours" / "dit")  # which is not there at all
  assert convert(*args, "--overwrite") == 0
  assert load(tmp_path / "ours").variant == "reference_infer"


def test_a_folder_in_a_cut_one_of_the_same_name_gets_nothing_of_it(tmp_path, target, monkeypatch):
  """Both would use a hidden folder of one name."""
  kill_exchange(tmp_path, monkeypatch, RENAMES - 2)
  with write.replace_folder(target / "target", False, tmp_path / "source") as new:
    (new / "mine").write_text("x")
  assert folders(target / "target") == ["mine"]
  assert (target / "config.json").read_text() == "new"


@pytest.mark.parametrize("number", range(2, 7))
def test_folders_without_files_come_back_too(tmp_path, target, monkeypatch, number):
  for path in (target / "dit", target / "google" / "umt5-xxl"):
    shutil.rmtree(path)
    path.mkdir()
  (target / "dit" / "a" / "b").mkdir(parents=True)
  (target / "dit").chmod(0o700)
  before = content(target)
  kill_exchange(tmp_path, monkeypatch, number)
  with pytest.raises(CheckpointError, match="is there already"):
    exchange_with(tmp_path, overwrite=False)
  assert content(target) == before
  assert (target / "dit").stat().st_mode & 0o777 == 0o700


def exchange_with(parent, overwrite):
  with write.replace_folder(parent / "target", overwrite, parent / "source"):
    raise AssertionError("begun")


def test_what_was_replaced_comes_back_if_what_is_new_was_deleted(tmp_path, target, monkeypatch):
  before = content(target)
  kill_exchange(tmp_path, monkeypatch, 5)
  shutil.rmtree(target / ".target.converting" / "new")
  with pytest.raises(CheckpointError, match="is there already"):
    exchange_with(tmp_path, overwrite=False)
  assert content(target) == before


def test_folders_on_other_disks_are_refused(tmp_path, target):
  other = Path("/dev/shm")
  if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
    pytest.skip("there is one disk only")
  shutil.rmtree(target / "google")
  far = other / f"hfjax-test-{os.getpid()}"
  far.mkdir()
  try:
    for has_old in (False, True):
      if has_old:
        (far / "umt5-xxl").mkdir()
      (target / "google").unlink(missing_ok=True)
      (target / "google").symlink_to(far)
      before = content(target)
      with pytest.raises(CheckpointError, match="google is no folder on the disk of"):
        exchange(tmp_path)
      assert content(target) == before
  finally:
    shutil.rmtree(far)


def test_a_file_where_a_folder_is_to_be_is_refused(tmp_path, target):
  shutil.rmtree(target / "google")
  (target / "google").write_text("a file")
  before = content(target)
  with pytest.raises(CheckpointError, match="google is no folder"):
    exchange(tmp_path)
  assert content(target) == before


@pytest.mark.parametrize("is_new", [False, True])
def test_everything_reaches_the_disk(tmp_path, target, monkeypatch, is_new):
  """Should the power fail afterwards, neither contents nor names are lost."""
  if is_new:
    shutil.rmtree(target)
  plain, synced = os.fsync, set()

  def fsync(descriptor):
    synced.add(os.fstat(descriptor).st_ino)
    plain(descriptor)

  monkeypatch.setattr(os, "fsync", fsync)
  exchange(tmp_path)
  written = ["dit", "dit/model.safetensors", "google/umt5-xxl", "google/umt5-xxl/spiece.model",
             "config.json", "google", "."]  # fmt: skip
  assert {(target / n).stat().st_ino for n in written} <= synced
  assert not is_new or tmp_path.stat().st_ino in synced


# ---- Runs at the same time ----


def test_long_names_that_begin_alike_do_not_exclude_each_other(tmp_path):
  one, two = (tmp_path / ("x" * 240 + end) for end in "ab")
  source = tmp_path / "source"
  busy = pytest.raises(CheckpointError, match="Another conversion is writing")
  hold = lambda target: write.replace_folder(target, False, source)
  with hold(one), hold(two), busy, hold(one):
    pass
  assert folders(one) == folders(two) == []


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_place_that_vanishes_while_it_is_taken_is_made_again(tmp_path, monkeypatch, when):
  """Another process may end, and remove it, between the opening of the lock and its taking."""
  plain, calls = fcntl.flock, []

  def flock(f, how):
    calls.append(how)
    if when == "after":
      plain(f, how)
    if len(calls) == 1:
      shutil.rmtree(tmp_path / ".target.converting")
    if when == "before":
      plain(f, how)

  monkeypatch.setattr(fcntl, "flock", flock)
  with write.replace_folder(tmp_path / "target", False, tmp_path / "source") as new:
    (new / "mine").write_text("x")
    with pytest.raises(CheckpointError, match="Another conversion is writing"):
      exchange_with(tmp_path, overwrite=False)
  assert folders(tmp_path) == ["target"] and len(calls) == 3


def test_a_place_that_vanishes_as_it_is_made_is_anothers(tmp_path, monkeypatch):
  def mkdir(self, *args, **kwargs):
    raise FileExistsError(
      17, "File exists"
    )  # what Path.mkdir says of a folder that is there no more

  monkeypatch.setattr(Path, "mkdir", mkdir)
  with pytest.raises(CheckpointError, match="Another conversion is writing"):
    exchange_with(tmp_path, overwrite=False)


def test_a_target_that_comes_to_be_meanwhile_is_left_alone(tmp_path, monkeypatch):
  plain = fcntl.flock

  def flock(f, how):
    plain(f, how)
    (tmp_path / "target").mkdir(exist_ok=True)

  monkeypatch.setattr(fcntl, "flock", flock)
  with pytest.raises(CheckpointError, match="Another conversion is writing"):
    exchange_with(tmp_path, overwrite=False)
  assert folders(tmp_path) == ["target"]
