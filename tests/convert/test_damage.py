"""Damaged and hostile files; those of PyTorch are tested with the oracles."""

import json
import os
import re

import ml_dtypes
import numpy as np
import pytest

from hfjax.convert import CheckpointError, checkpoint, load
from tests.convert.helpers import CFG, DENSE, TENSORS, convert, folders, put, refused, tensors_of


def drop(n):
  return lambda t: [t.pop(k) for k in sorted(k for k in t if "blocks.1." in k)[:n]]


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    (lambda t: t.pop("blocks.1.norm3.bias"), "1 missing tensor: blocks.1.norm3.bias"),
    (lambda t: t.update({"blocks.0.new": np.ones(1, np.float32)}), "1 unexpected tensor"),
    (lambda t: t.update({"blocks.0.norm3.bias": np.ones(5, np.float32)}), "misshapen"),
    (drop(25), "25 missing tensors: .* and 5 more"),
    (lambda t: t.pop("blocks.1.self_attn.linear_proj.bias"), "missing tensor: blocks.1"),
    (lambda t: t.pop("head.head.weight"), "head.weight, which tells the arch"),
    (lambda t: t["head.head.bias"].__setitem__(3, np.nan), "head.bias holds 1 numbers"),
    (lambda t: t["blocks.0.ffn.0.weight"].__setitem__(0, np.inf), "holds 32 numbers"),
  ],
)  # fmt: skip
def test_damaged_weights_are_refused_and_nothing_is_written(tmp_path, capsys, change, sentence):
  tensors = {k: v.copy() for k, v in TENSORS.items()}
  change(tensors)
  put(tmp_path / "wan", tensors)
  error = refused(capsys, tmp_path / "wan", tmp_path / "ours")
  assert re.search(sentence, error), error
  assert folders(tmp_path) == ["wan"]


def test_nan_in_half_precision_is_seen(tmp_path, capsys):
  tensors = tensors_of(dtype=ml_dtypes.bfloat16)
  tensors["patch_embedding.bias"][0] = float("nan")
  put(tmp_path / "wan", tensors)
  assert "patch_embedding.bias holds 1" in refused(capsys, tmp_path / "wan", tmp_path / "ours")


@pytest.mark.parametrize(
  ("key", "value", "sentence"),
  [("dim", 64, "dim 64 against 32"), ("num_layers", 30, "num_layers 30 against 2"),
   ("num_heads", 4, "num_heads 4 against 2")],
)  # fmt: skip
def test_a_config_of_another_model_is_refused(tmp_path, capsys, key, value, sentence):
  put(tmp_path / "wan", cfg={**CFG, key: value})
  error = refused(capsys, tmp_path / "wan", tmp_path / "ours")
  assert sentence in error and "disagree" in error


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    ({"in_channels": 36}, None),  # the older of two conventions is right
    ({"in_channels": 4, "in_dim": 36}, None),
    ({"in_channels": 36, "in_dim": 16}, "in_dim 16 and in_channels 36 against 4"),
    ({"num_attention_heads": 4}, None),  # the linear branch tells the heads
  ],
)
def test_tensors_decide_between_keys_that_contradict_each_other(tmp_path, capsys, change, sentence):
  put(tmp_path / "wan", cfg={**CFG, **change})
  if sentence is None:
    assert convert(tmp_path / "wan", tmp_path / "ours") == 0
  else:
    assert sentence in refused(capsys, tmp_path / "wan", tmp_path / "ours")


def test_where_tensors_cannot_decide_contradictions_are_refused(tmp_path, capsys):
  put(tmp_path / "wan", tensors_of(DENSE), {**CFG, "num_attention_heads": 4})
  error = refused(capsys, tmp_path / "wan", tmp_path / "ours")
  assert "contradicts itself: num_heads is 2, and num_attention_heads 4" in error


def test_a_configuration_of_another_program_is_not_followed(tmp_path, capsys):
  put(tmp_path / "wan", cfg={"model_type": "llama", "hidden_size": 7, "num_attention_heads": 9})
  assert convert(tmp_path / "wan", tmp_path / "ours") == 0
  assert "config.json is of no dit, and was not followed" in capsys.readouterr().out


@pytest.mark.parametrize(
  "cfg",
  [{"dim": 64, "num_layers": 2}, {**CFG, "_class_name": "FluxTransformer2DModel"},
   {"model_type": "ti2v"}, {**CFG, "eps": -1}],
)  # fmt: skip
def test_a_configuration_that_is_blamed_is_named(tmp_path, capsys, cfg):
  config = put(tmp_path / "wan", cfg=cfg) / "config.json"
  error = refused(capsys, tmp_path / "wan", tmp_path / "ours")
  assert f"So says {config}: bring the model's own, or move it away." in error
  if cfg.get("eps") != -1:
    config.unlink()
    assert convert(tmp_path / "wan", tmp_path / "ours") == 0


@pytest.mark.parametrize("name", ["high_noise_model", "transformer_2"])
def test_two_transformers_that_take_turns_are_refused(tmp_path, capsys, name):
  put(tmp_path / "wan" / name)
  put(tmp_path / "wan")
  for args in ((), ("--model", "dit")):
    error = refused(capsys, tmp_path / "wan", tmp_path / "ours", *args)
    assert f"is of Wan 2.2, with two transformers (one in {name})" in error
  assert "holds no vae" in refused(capsys, tmp_path / "wan", tmp_path / "x", "--model", "vae")


def test_a_mark_before_the_text_is_no_damage(tmp_path):
  """Some editors write it."""
  config = put(tmp_path / "wan") / "config.json"
  config.write_text("\ufeff" + config.read_text(), encoding="utf-8")
  assert convert(tmp_path / "wan", tmp_path / "ours") == 0


def corrupt(data, how):
  size = int.from_bytes(data[:8], "little")
  header = json.loads(data[8 : 8 + size])
  name = sorted(k for k in header if k != "__metadata__")[0]
  if how == "truncated":
    return data[:-100]
  if how == "short":
    return data[:5]
  if how == "no json":
    return data[:8] + b"x" * size + data[8 + size :]
  if how == "huge header":
    return (2**62).to_bytes(8, "little") + data[8:]
  if how == "offsets":
    header[name]["data_offsets"][1] += 4
  if how == "shape":
    header[name]["shape"] = [10**6, 10**6]
  if how == "dtype":
    header[name]["dtype"] = "F9"
  if how == "negative":
    header[name]["data_offsets"][0] = -8
  text = json.dumps(header).encode()
  return len(text).to_bytes(8, "little") + text + data[8 + size :]


KINDS_OF_DAMAGE = ["truncated", "short", "no json", "huge header", "offsets", "shape", "dtype",
                   "negative"]  # fmt: skip


@pytest.mark.parametrize("how", KINDS_OF_DAMAGE)
def test_lying_and_truncated_files_are_refused(tmp_path, capsys, how):
  file = put(tmp_path / "wan") / "diffusion_pytorch_model.safetensors"
  file.write_bytes(corrupt(file.read_bytes(), how))
  assert "can be read" in refused(capsys, tmp_path / "wan", tmp_path / "ours")
  assert folders(tmp_path) == ["wan"]


def test_random_damage_never_gives_a_traceback(tmp_path):
  """Either a sentence, or weights of the same shapes (a bit of the data may have flipped)."""
  file = put(tmp_path / "wan") / "diffusion_pytorch_model.safetensors"
  data, r = file.read_bytes(), np.random.default_rng(0)
  for _ in range(150):
    broken = bytearray(data)
    for at in r.integers(0, r.choice([8, 400, len(data)]), r.integers(1, 4)):
      broken[at] = r.integers(256)
    file.write_bytes(bytes(broken[: r.integers(1, len(broken))] if r.random() < 0.2 else broken))
    try:
      parts = checkpoint.open_parts(tmp_path / "wan")
      for tensor in parts[0].tensors.values():
        assert tensor.read().shape == tensor.shape
    except CheckpointError:
      pass


def test_sources_without_weights_are_refused(tmp_path, capsys):
  (tmp_path / "empty").mkdir()
  (tmp_path / "text.txt").write_text("no weights")
  put(tmp_path / "other", {"layer.weight": np.ones((2, 2), np.float32)}, None)
  for source, sentence in (
    ("none", "is not there"), ("empty", "holds no weights"), ("text.txt", "neither safetensors"),
    ("other", "no model that hfjax knows"),
  ):  # fmt: skip
    assert sentence in refused(capsys, tmp_path / source, tmp_path / "ours")
  put(tmp_path / "two")
  put(tmp_path / "two", cfg=None, name="copy.safetensors")
  assert "more than one dit" in refused(capsys, tmp_path / "two", tmp_path / "ours")
  (tmp_path / "wan").mkdir()
  put(tmp_path / "wan")
  (tmp_path / "wan" / "config.json").write_text("{")
  assert "no JSON file" in refused(capsys, tmp_path / "wan", tmp_path / "ours")


def test_a_damaged_hfjax_folder_is_refused(tmp_path):
  put(tmp_path / "wan")
  assert convert(tmp_path / "wan", tmp_path / "ours") == 0
  config = tmp_path / "ours" / "dit" / "config.json"
  info = json.loads(config.read_text())
  for change, sentence in (
    ({"architecture": {**info["architecture"], "layers": 3}}, "does not fit its config.json"),
    ({"architecture": {**info["architecture"], "size": 3}}, "describes no dit"),
    ({"architecture": {**info["architecture"], "heads": 3}}, "describes no dit"),
    ({"model": "gan"}, "is no hfjax model"),
  ):
    config.write_text(json.dumps({**info, **change}))
    with pytest.raises(CheckpointError, match=sentence):
      load(tmp_path / "ours" / "dit")


ODD = [None, True, -1, 0, 2.5, 1e400, float("nan"), 10**30, "", "x", [], [1], [[1]], {}, {"a": 1}]


def variations(value, r, count):
  """JSON texts near `value`: other values, missing and new keys, cuts, deep nesting."""
  yield "[" * 100_000
  yield '{"a":' * 100_000
  yield json.dumps(value)[:-1]
  yield '{"num_heads": ' + "9" * 5000 + "}"
  yield "\ufeff{}"
  for _ in range(count):
    changed = json.loads(json.dumps(value))
    inner = changed
    while True:
      key = r.choice(list(inner))
      if not isinstance(inner[key], dict) or not inner[key] or r.random() < 0.3:
        break
      inner = inner[key]
    inner[key] = ODD[r.integers(len(ODD))]
    yield json.dumps(changed)


@pytest.mark.parametrize("what", ["config", "index", "hfjax"])
def test_random_json_never_gives_a_traceback(tmp_path, capsys, what):
  put(tmp_path / "wan")
  source, file, value = tmp_path / "wan", tmp_path / "wan" / "config.json", CFG
  if what == "index":
    file = tmp_path / "wan" / "diffusion_pytorch_model.safetensors.index.json"
    shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
    (tmp_path / "wan" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "wan" / shard)
    value = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(TENSORS, shard)}
  if what == "hfjax":
    assert convert(source, tmp_path / "ours") == 0
    source, file = tmp_path / "ours", tmp_path / "ours" / "dit" / "config.json"
    value = {**json.loads(file.read_text()), "dtypes": {"head.head.bias": "BF16"}}
  for text in variations(value, np.random.default_rng(0), 40):
    file.write_text(text)
    if convert(source, tmp_path / "out", "--overwrite", "--to", "diffusers") != 0:
      error = capsys.readouterr().err
      assert error.startswith("convert_checkpoint: ") and error.count("\n") == 1, error


NUMBERED = [f"w-0000{i}-of-00002.safetensors" for i in (1, 2)]


@pytest.mark.parametrize(
  ("files", "named", "sentence"),
  [
    (["a.safetensors", "b.safetensors"], None, None),
    (NUMBERED, None, None),
    (NUMBERED, ["../x.safetensors"], "does not name files beside it"),
    (NUMBERED, ["nope.safetensors"], "does not hold all shards of w .nope.safetensors."),
    (NUMBERED, [[1]], "does not name files beside it"),
  ],
)
def test_shards_follow_their_index(tmp_path, files, named, sentence):
  half = len(TENSORS) // 2
  put(tmp_path / "w", dict([*TENSORS.items()][:half]), name=files[0])
  put(tmp_path / "w", dict([*TENSORS.items()][half:]), name=files[1])
  index = {k: (named or files)[i % len(named or files)] for i, k in enumerate(TENSORS)}
  (tmp_path / "w" / "w.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
  if sentence is None:
    assert checkpoint.open_parts(tmp_path / "w")[0].tensors.keys() == TENSORS.keys()
  else:
    with pytest.raises(CheckpointError, match=sentence):
      checkpoint.open_parts(tmp_path / "w", "dit")


def test_one_file_and_shards_of_it_are_not_told_apart(tmp_path, capsys):
  put(tmp_path / "wan")
  put(tmp_path / "wan", name="diffusion_pytorch_model-00001-of-00001.safetensors")
  error = refused(capsys, tmp_path / "wan", tmp_path / "ours")
  assert "both in one file and in shards" in error


def with_shape(name, shape):
  return {**TENSORS, name: np.zeros(shape, np.float32)}


@pytest.mark.parametrize(
  ("tensors", "sentence"),
  [
    (with_shape("blocks.0.self_attn.linear_proj.weight", (1,)), r"has shape \[1\]; it must have 2"),
    (with_shape("blocks.0.self_attn.linear_proj.weight", (0, 16)), r"none of them empty"),
    (with_shape("patch_embedding.weight", (32, 4, 1, 2, 0)), "none of them empty"),
    (with_shape("blocks.99999.norm3.bias", (1,)), "one of block 99999; it is damaged"),
    (with_shape(f"blocks.{'9' * 5000}.norm3.bias", (1,)), r"1 unexpected tensor: blocks.9+\.\.\."),
    (with_shape("a\n\x1b[31mb", (1,)), r"1 unexpected tensor: a\\n\\x1b\[31mb"),
    (with_shape("e" * 100_000, (1,)), "1 unexpected tensor: e{100}[.]{3}"),
  ],
)
def test_names_and_shapes_that_mean_nothing(tmp_path, capsys, tensors, sentence):
  put(tmp_path / "wan", tensors)
  error = refused(capsys, tmp_path / "wan", tmp_path / "ours")
  assert re.search(sentence, error), error[:500]
  assert len(error) < 5000


def test_what_is_called_safetensors_and_is_no_file(tmp_path, capsys):
  folder = put(tmp_path / "wan")
  (folder / "folder.safetensors").mkdir()
  assert convert(folder, tmp_path / "ours") == 0
  (folder / "broken.safetensors").symlink_to("/nowhere")
  assert "broken.safetensors is a link to nothing" in refused(capsys, folder, tmp_path / "x")
  os.mkfifo(tmp_path / "pipe.safetensors")
  assert "is no file" in refused(capsys, tmp_path / "pipe.safetensors", tmp_path / "x")
