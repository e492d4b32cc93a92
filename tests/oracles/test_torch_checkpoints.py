"""Files of PyTorch trainers, in; and hostile ones."""

import contextlib
import io
import json
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from hfjax.convert import CheckpointError, checkpoint, load, stored
from tests.convert.helpers import CFG, TENSORS, convert, folders, refused, same

WEIGHTS = {k: torch.from_numpy(v.copy()) for k, v in TENSORS.items()}
EMA = {k: v + 1 for k, v in WEIGHTS.items()}


def prefixed(prefix, tensors=WEIGHTS):
  return {prefix + k: v for k, v in tensors.items()}


def wrapped(tensors):
  """Names as nested FSDP leaves them."""
  return {
    "model." + k.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."): v
    for k, v in tensors.items()
  }


def read(path, averaged=False):
  part = checkpoint.open_parts(path, averaged=averaged)[0]
  return {k: t.read() for k, t in part.tensors.items()}


@pytest.mark.parametrize(
  "held",
  [
    WEIGHTS,
    {"generator": prefixed("model.")},
    {"model": prefixed("model.diffusion_model.")},
    {"state_dict": prefixed("model._orig_mod.")},
    {"generator": wrapped(WEIGHTS), "critic": {"x": torch.ones(2)}, "step": 7},
    {"generator": prefixed("model.", WEIGHTS), "generator_ema": wrapped(EMA)},
    {"generator_ema": wrapped(WEIGHTS)},
  ],
)
def test_weights_of_trainers(tmp_path, held):
  torch.save(held, tmp_path / "model.pt")
  same(read(tmp_path / "model.pt"), TENSORS)


def test_moving_averages_on_request(tmp_path, capsys):
  torch.save({"generator": WEIGHTS, "generator_ema": wrapped(EMA)}, tmp_path / "model.pt")
  same(read(tmp_path / "model.pt", averaged=True), {k: v.numpy() for k, v in EMA.items()})
  assert convert(tmp_path / "model.pt", tmp_path / "ours", "--ema", "--to", "original") == 0
  found = load_file(tmp_path / "ours" / "diffusion_pytorch_model.safetensors")
  same(found, {k: v.numpy() for k, v in EMA.items()})
  torch.save({"generator": WEIGHTS}, tmp_path / "plain.pt")
  assert "holds no averaged weights" in refused(
    capsys, tmp_path / "plain.pt", tmp_path / "x", "--ema"
  )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_and_views(tmp_path, dtype):
  tensors = {k: v.to(dtype) for k, v in WEIGHTS.items()}
  # Tensors that share a storage, and one that is not contiguous.
  both = torch.stack([tensors["blocks.0.ffn.0.bias"], tensors["blocks.1.ffn.0.bias"]])
  tensors["blocks.0.ffn.0.bias"], tensors["blocks.1.ffn.0.bias"] = both[0], both[1]
  tensors["head.head.weight"] = tensors["head.head.weight"].T.contiguous().T
  torch.save(tensors, tmp_path / "model.pt")
  got = read(tmp_path / "model.pt")
  for k, v in tensors.items():
    want = v.contiguous().flatten().view(torch.uint8).numpy()
    assert got[k].tobytes() == want.tobytes(), k
  again = read(tmp_path / "model.pt")
  same(got, again)


def test_conversion_equals_that_of_safetensors(tmp_path):
  torch.save({"generator": prefixed("model.")}, tmp_path / "model.pt")
  assert convert(tmp_path / "model.pt", tmp_path / "ours") == 0
  loaded = load(tmp_path / "ours")
  assert loaded.variant == "reference_infer" and loaded.preset == "hybrid"
  same({k: t.read() for k, t in checkpoint.open_parts(tmp_path / "ours")[0].tensors.items()},
       TENSORS)  # fmt: skip


@pytest.mark.parametrize(
  ("name", "key", "preset"),
  [
    ("self_forcing_dmd.pt", "generator_ema", "self_forcing"),
    ("model.pt", "generator", "self_forcing"),
    ("longlive_base.pt", "generator", "longlive"),
    ("model.pt", "model", "wan"),
  ],
)
def test_how_dense_models_are_to_be_sampled(tmp_path, name, key, preset):
  dense = {k: v for k, v in WEIGHTS.items() if "linear_proj" not in k}
  torch.save({key: prefixed("model.", dense)}, tmp_path / name)
  (tmp_path / "config.json").write_text(json.dumps(CFG))
  assert convert(tmp_path / name, tmp_path / "ours") == 0
  loaded = load(tmp_path / "ours")
  assert (loaded.variant, loaded.preset) == ("reference_dense", preset)


def test_low_rank_updates_of_a_trainer(tmp_path, capsys):
  """As LongLive keeps them, in the form of PEFT, beside other things."""
  r = np.random.default_rng(0)
  up, down = (r.normal(size=s).astype(np.float32) for s in ((32, 4), (4, 32)))
  name = "base_model.model.model.blocks.1.self_attn.q.lora_{}.weight"
  update = {name.format("A"): torch.from_numpy(down), name.format("B"): torch.from_numpy(up)}
  torch.save(WEIGHTS, tmp_path / "longlive_base.pt")
  torch.save({"generator_lora": update, "step": 7}, tmp_path / "lora.pt")
  args = ("--lora", f"{tmp_path / 'lora.pt'}@0.5", "--to", "original")
  assert convert(tmp_path / "longlive_base.pt", tmp_path / "merged", *args) == 0
  merged = load_file(tmp_path / "merged" / "diffusion_pytorch_model.safetensors")
  key = "blocks.1.self_attn.q.weight"
  np.testing.assert_allclose(merged[key], TENSORS[key] + 0.5 * (up @ down), atol=1e-6)
  others = lambda x: {k: v for k, v in x.items() if k != key}
  same(others(merged), others(TENSORS))
  for held, found in (
    (
      {"generator_lora": update, "critic_lora": {**update, name.format("C"): torch.ones(1)}},
      "2 sets .*generator_lora, critic_lora",
    ),
    ({"generator": WEIGHTS}, "0 sets of low-rank updates .none"),
  ):
    torch.save(held, tmp_path / "lora.pt")
    error = refused(capsys, tmp_path / "longlive_base.pt", tmp_path / "new", *args)
    assert re.search(found, error)


def test_the_folder_of_a_trainer(tmp_path, capsys):
  """Weights and their averages in files of their own, and what is no weights beside them."""
  torch.save({"generator": prefixed("model.")}, tmp_path / "model.pt")
  torch.save({"generator_ema": wrapped(EMA)}, tmp_path / "ema_model.pt")
  torch.save({"state": {0: {"step": 1}}}, tmp_path / "optimizer.pt")
  same(read(tmp_path), TENSORS)
  same(read(tmp_path, averaged=True), {k: v.numpy() for k, v in EMA.items()})
  assert convert(tmp_path, tmp_path / "ours", "--ema") == 0
  assert "Left out optimizer.pt" in capsys.readouterr().out
  origin = stored.read_config(tmp_path / "ours" / "dit")[2]["origin"]
  assert [*origin["files"]] == ["ema_model.pt"] and origin["averaged"]
  assert origin["key"] == "generator_ema"


def test_averages_alone_are_taken_and_said(tmp_path):
  torch.save({"generator_ema": wrapped(EMA)}, tmp_path / "model.pt")
  assert "moving averages of weights (generator_ema)" in checkpoint.open_parts(tmp_path)[0].notes[0]


def test_configurations_of_other_programs_beside_the_file(tmp_path, capsys):
  torch.save({"generator": prefixed("model.")}, tmp_path / "model.pt")
  config = tmp_path / "config.json"
  config.write_text(json.dumps({"lr": 1e-4, "model_type": "trainer", "num_layers": 7}))
  same(read(tmp_path / "model.pt"), TENSORS)
  config.write_text(json.dumps({"dim": 7, "num_layers": 7}))
  error = refused(capsys, tmp_path / "model.pt", tmp_path / "ours")
  assert f"So says {config}: bring the model's own, or move it away." in error


def test_random_objects_never_give_a_traceback(tmp_path):
  r = np.random.default_rng(0)

  def draw(depth):
    kind = r.integers(7 if depth else 4)
    if kind < 4:
      return [3, "x", torch.ones(int(r.integers(3))), torch.eye(2).to_sparse()][kind]
    inner = [draw(depth - 1) for _ in range(r.integers(4))]
    keys = ["generator", "model", "a", 5]
    return inner if kind == 4 else tuple(inner) if kind == 5 else dict(zip(keys, inner))

  for _ in range(100):
    torch.save(draw(4), tmp_path / "model.pt")
    with pytest.raises(CheckpointError):
      checkpoint.open_parts(tmp_path / "model.pt")


class Evil:
  """Runs a command when it is unpickled."""

  def __reduce__(self):
    return (os.system, ("touch evil",))


def archive(path, pickled, compression=zipfile.ZIP_STORED):
  with zipfile.ZipFile(path, "w", compression) as f:
    f.writestr("archive/data.pkl", pickled)
    f.writestr("archive/version", "3\n")
    f.writestr("archive/byteorder", "little")


def deep():
  """Dictionaries within each other, fewer than Python's own pickling can do."""
  held = {}
  for _ in range(150):
    held = {"a": held}
  return held


def itself():
  held = {}
  held["a"] = held
  return held


def shared():
  """A tree of 2^40 leaves of which only 40 are there."""
  held = [0]
  for _ in range(40):
    held = [held, held]
  return held


def legacy(path, value):
  torch.save(value, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
  ("make", "sentence"),
  [
    (lambda p: torch.save({"generator": WEIGHTS, "args": Evil()}, p), "asks to run code"),
    (lambda p: p.write_bytes(pickle.dumps(Evil())), "can be read|asks to run code"),
    (lambda p: legacy(p, WEIGHTS), "can be read"),
    (lambda p: p.write_bytes(b""), "can be read"),
    (lambda p: p.write_bytes(b"PK\x03\x04 nothing"), "can be read"),
    (lambda p: torch.save(torch.ones(3), p), "holds a Tensor, not a dictionary"),
    (lambda p: torch.save({"step": 3}, p), "holds no weights"),
    (lambda p: torch.save({"generator": {**WEIGHTS, "step": 3}}, p), "step of type int"),
    (lambda p: torch.save({"a": torch.ones(2, dtype=torch.complex64)}, p), "a as complex64"),
    (lambda p: torch.save({"a": torch.ones(2, dtype=torch.int32)}, p), "a as int32"),
    (lambda p: torch.save({"a": torch.eye(3).to_sparse()}, p), "a as a sparse tensor"),
    (lambda p: torch.save({"a": torch._neg_view(torch.ones(3))}, p), "sparse tensor, a view"),
    (lambda p: torch.save({"a": torch.ones(3, device="meta")}, p), "without data"),
    (lambda p: torch.save(deep(), p), "holds no weights"),
    (lambda p: torch.save(itself(), p), "holds no weights"),
    (lambda p: torch.save({"generator": {"a": torch.ones(2)}, "x": shared()}, p), "no model that"),
    (lambda p: archive(p, b"garbage"), "its pickle is damaged"),
    (lambda p: archive(p, b""), "can be read"),
    (lambda p: archive(p, b"\0" * 2**20, zipfile.ZIP_DEFLATED), "data.pkl is compressed or far"),
    (lambda p: archive(p, b"\0" * (2**26 + 1)), "data.pkl is compressed or far too large"),
    (lambda p: archive(p, b"\x80\x02cos\nsystem\nX\x04\0\0\0echo\x85R."), "asks to run code"),
  ],
)  # fmt: skip
def test_hostile_files_get_a_sentence(tmp_path, monkeypatch, capsys, make, sentence):
  monkeypatch.chdir(tmp_path)
  make(tmp_path / "model.pt")
  error = refused(capsys, tmp_path / "model.pt", tmp_path / "ours")
  assert re.search(sentence, error), error
  assert folders(tmp_path) == ["model.pt"]


def test_truncated_and_damaged_files_never_give_a_traceback(tmp_path):
  buffer = io.BytesIO()
  torch.save({"generator": WEIGHTS}, buffer)
  data, r = buffer.getvalue(), np.random.default_rng(0)
  path = tmp_path / "model.pt"
  for n in range(80):
    broken = bytearray(data)
    if n % 2:
      broken = broken[: r.integers(0, len(data))]
    else:
      for at in r.integers(0, len(data), 5):
        broken[at] = r.integers(256)
    path.write_bytes(bytes(broken))
    with contextlib.suppress(CheckpointError):
      assert read(path).keys() == TENSORS.keys()


def test_a_pickle_that_lies_about_its_storage(tmp_path):
  """Records that are shorter than the pickle says."""
  torch.save({"generator": WEIGHTS}, tmp_path / "good.pt")
  with (
    zipfile.ZipFile(tmp_path / "good.pt") as good,
    zipfile.ZipFile(tmp_path / "model.pt", "w", zipfile.ZIP_STORED) as bad,
  ):
    for item in good.infolist():
      data = good.read(item)
      bad.writestr(item.filename, data[: len(data) // 2] if "/data/" in item.filename else data)
  with pytest.raises(CheckpointError):
    read(tmp_path / "model.pt")
