"""Stage `flow` with a text encoder that is trained too, and what becomes of it."""

import dataclasses
import json
import shutil

import convert_checkpoint
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax import pipeline, train
from hfjax.convert import checkpoint
from hfjax.convert.part import Part, named_tensors
from hfjax.convert.registry import KINDS
from hfjax.convert.source import Tensor
from hfjax.data import made, vocabulary
from hfjax.distill.supervised import FlowMatching
from hfjax.models import umt5, vae, wan
from hfjax.models.umt5 import Umt5Config
from hfjax.models.vae import VaeConfig
from hfjax.streaming.trees import named, renamed
from hfjax.text import EOS, Tokenizer
from hfjax.training import config, items, plan, stages, validation, weights
from hfjax.training.feed import Feed
from tests.helpers import random_params
from tests.training.runs import (
  DECAY,
  FLOW,
  SMALL,
  arrays,
  asks,
  assert_same_arrays,
  each_batch,
  metrics,
  one_device,
  said,
  small_programs,
  videos,
)

TEXT = Umt5Config(vocab=128, dim=12, dim_attn=8, dim_ffn=8, heads=2, layers=1)
VAE = VaeConfig(
  dim=4, z_dim=4, mean=(0.0,) * 4, std=(1.0,) * 4, dim_mult=(1, 2), num_res_blocks=1,
  temporal_downsample=(True,),
)  # fmt: skip
STEPS, START = 4, 1
PROMPTS = ["a red blob moves up", "a blue blob", "moves"]
NEGATIVE = "down left"


predict_flow = wan.predict_flow


def linear(model, params, x, t, context, **options):
  """Stands for `wan.predict_flow`, and compiles in no time."""
  text = context.mean(axis=1) @ params["text"]["in"]["kernel"][:, : x.shape[-1]]
  return x * params["time"]["in"]["bias"][: x.shape[-1]] + text[:, None, None, None]


@pytest.fixture(scope="module", autouse=True)
def programs():
  with small_programs(), one_device(), pytest.MonkeyPatch.context() as patch:
    patch.setitem(umt5.PRESETS, "small", TEXT)
    patch.setattr(wan, "predict_flow", linear)
    yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  """A folder with one of the words of data that are made."""
  folder = tmp_path_factory.mktemp("tokenizer")
  prompts = [made.made_latents(1, 2, 2, 4, 64)[i]["prompt"] for i in range(64)]
  (folder / "spiece.model").write_bytes(vocabulary.train(sorted(prompts), TEXT.vocab))
  return folder


@pytest.fixture(scope="module")
def options(tokenizer):
  return [
    *FLOW,
    "--config.flow.train_text_encoder=True",
    f"--config.steps={STEPS}",
    f"--config.ema.start={START}",
    f"--config.text.negative={NEGATIVE}",
    f"--config.text.tokenizer={tokenizer}",
  ]


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
  """A run that nothing interrupts, and its batches."""
  folder, fed = tmp_path_factory.mktemp("whole") / "run", []
  with each_batch(lambda _, batch: fed.append(jax.device_get(batch))):
    assert train.main([*options, f"--workdir={folder}"]) == 0
  return folder, fed


@pytest.fixture(scope="module")
def held(whole):
  """Arrays of each step, from 1."""
  return [None, *(arrays(whole[0], step)[0] for step in range(1, STEPS + 1))]


def planned(options, *more):
  return plan.make_plan(config.parse([*options, "--workdir=unused", *more]).config)


def text_of(held, item="umt5"):
  """Parameters of the text encoder among arrays of a step."""
  like = jax.eval_shape(lambda: umt5.init_params(TEXT, jax.random.key(0)))
  flat = {k.removeprefix(f"{item}/"): x for k, x in held.items() if k.startswith(f"{item}/")}
  return renamed(like, flat)


@jax.jit
def encode(params, ids, length):
  return umt5.encode(TEXT, params, ids, length)


def contexts(params, tokenizer, prompts):
  """What a text encoder makes of prompts, by itself."""
  tokens = Tokenizer.load(tokenizer, SMALL.text_len)(prompts)
  return np.asarray(encode(params, tokens.ids, tokens.length))


# What is fed, and what is learnt


def test_batches_are_of_tokens(whole, tokenizer):
  load = Tokenizer.load(tokenizer, SMALL.text_len)
  negative = load([NEGATIVE])
  for batch in whole[1]:
    texts = batch["texts"]
    assert texts.ids.shape == (1, 2, SMALL.text_len) and texts.length.shape == (1, 2)
    np.testing.assert_array_equal(texts.negative_ids, negative.ids[None])
    np.testing.assert_array_equal(texts.negative_length, negative.length[None])
    for ids, length in zip(texts.ids[0], texts.length[0], strict=True):
      assert ids[length - 1] == EOS and not ids[length:].any() and np.all(ids[: length - 1] > EOS)
  # The captions of the data, not only any.
  seen = {tuple(ids) for batch in whole[1] for ids in batch["texts"].ids[0].tolist()}
  source = made.made_latents(2, 4, 6, 4, count=8, seed=0)
  assert seen == {tuple(load([source[i]["prompt"]]).ids[0].tolist()) for i in range(8)}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_have_the_shapes_that_programs_are_made_for(options, tmp_path, accumulate):
  p = planned(options, "--config.batch=4", f"--config.accumulate={accumulate}")
  batch, want = Feed(p, weights.Encoder(p), tmp_path, print)(), stages.batch_shapes(p)
  assert jax.tree.structure(batch) == jax.tree.structure(want)
  for x, y in zip(*map(jax.tree.leaves, (batch, want)), strict=True):
    assert (x.shape, x.dtype) == (y.shape, y.dtype) and x.sharding == y.sharding


@pytest.mark.parametrize("context", [None, 12])
def test_tokens_of_what_is_kept_on_the_device_are_those_of_its_prompts(options, tmp_path, context):
  """Whatever contexts another encoder made for the data."""
  prompts = (*PROMPTS, "a blue blob moves to the left")
  data = videos(tmp_path / "data", prompts=prompts, context=context)
  p = planned(options, data, "--config.data.resident=True")
  encoder = weights.Encoder(p)
  feed, want = Feed(p, encoder, tmp_path, print), stages.batch_shapes(p)
  found = [feed() for _ in range(2)]
  for batch in found:
    assert jax.tree.structure(batch) == jax.tree.structure(want)
    for x, y in zip(*map(jax.tree.leaves, (batch, want)), strict=True):
      assert (x.shape, x.dtype) == (y.shape, y.dtype) and x.sharding == y.sharding
    for latents, ids, length in zip(
      batch["latents"][0], batch["texts"].ids[0], batch["texts"].length[0], strict=True
    ):
      own = encoder.encode.tokenizer([prompts[round(float(latents[0, 0, 0, 0]) * 8)]])
      np.testing.assert_array_equal(ids, own.ids[0])
      assert length == own.length[0]
  assert len({float(x[0, 0, 0, 0]) for batch in found for x in batch["latents"][0]}) == 4


def test_gradients_reach_the_text_encoder(whole, held):
  start = named(text_of(held[1]))  # as the rate of the first step is zero
  for name, x in start.items():
    if name != "token_embedding":
      assert np.any(held[STEPS][f"umt5/{name}"] != x), name
  # Of the embedding those rows that were seen; the negative prompt is, as some texts are dropped.
  rows = held[STEPS]["umt5/token_embedding"] != np.asarray(start["token_embedding"])
  texts = [batch["texts"] for batch in whole[1]]
  seen = {i for x in texts for i in x.ids.ravel().tolist()} - {0}
  moved = set(np.flatnonzero(rows.any(axis=1)).tolist())
  dropped = set(texts[0].negative_ids.ravel().tolist()) - {0}
  assert seen <= moved <= seen | dropped


@pytest.mark.slow
def test_gradients_come_through_the_transformer(options, whole, monkeypatch):
  monkeypatch.setattr(wan, "predict_flow", predict_flow)
  p = planned(options)
  like = weights.load_trained(p, "student")
  params = {"student": random_params(SMALL), "text": like["text"]}
  batch = jax.tree.map(lambda x: x[0], whole[1][0])
  loss = lambda x: stages.loss_of(p, "student")(x, None, batch, jax.random.key(0))[0]
  for path, slope in named(jax.jit(jax.grad(loss))(params)).items():
    assert np.all(np.isfinite(slope)) and np.any(slope), path


def test_dropped_texts_have_the_encoding_of_the_negative_prompt(options, held, tokenizer):
  p = planned(options)
  student = {"x": jnp.ones(2)}
  params = {"student": student, "text": text_of(held[STEPS])}
  load = Tokenizer.load(tokenizer, SMALL.text_len)
  tokens = stages.Tokens(*load(PROMPTS), *load([NEGATIVE]))

  class Spy(FlowMatching):
    def loss(self, params, latents, texts, key):
      dropped = self.dropped(key, len(PROMPTS))[:, None, None]
      seen = jnp.where(dropped, texts.negative, texts.context)
      return (dropped * seen).sum(), {"params": params, "seen": seen, "dropped": dropped[:, 0, 0]}

  p = dataclasses.replace(p, objective=Spy(SMALL, drop_text=0.5))
  key = next(
    key for key in map(jax.random.key, range(99)) if p.objective.dropped(key, len(PROMPTS))[0]
    and not p.objective.dropped(key, len(PROMPTS)).all()
  )  # fmt: skip
  loss = lambda x: stages.loss_of(p, "student")(x, None, {"texts": tokens, "latents": None}, key)
  (_, got), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  assert_same_arrays(got["params"], student)
  want = contexts(params["text"], tokenizer, [*PROMPTS, NEGATIVE])
  want = np.where(got["dropped"][:, None, None], want[-1], want[:-1])
  np.testing.assert_allclose(got["seen"], want, rtol=0, atol=1e-6)
  moved = np.flatnonzero(np.asarray(slopes["text"]["token_embedding"]).any(axis=1))
  assert set(moved.tolist()) == set(tokens.negative_ids.ravel().tolist()) - {0}
  assert not any(np.any(x) for x in jax.tree.leaves(slopes["student"]))


def test_there_are_averages_of_both(held):
  assert {k.split("/")[0] for k in held[1]} == {"student", "umt5", "ema", "umt5_ema", "optimizers"}
  for item, averages in (("student", "ema"), ("umt5", "umt5_ema")):
    names = [k.removeprefix(f"{averages}/") for k in held[1] if k.startswith(f"{averages}/")]
    assert sorted(names) == sorted(k[len(item) + 1 :] for k in held[1] if k.startswith(f"{item}/"))
    for name in names:
      ema = held[1][f"{item}/{name}"]
      for step in range(1, STEPS + 1):
        now = held[step][f"{item}/{name}"]
        ema = now if step <= START else DECAY * ema + (1 - DECAY) * now
      np.testing.assert_allclose(
        held[STEPS][f"{averages}/{name}"], ema, rtol=1e-5, atol=1e-7, err_msg=name
      )
  assert np.any(held[STEPS]["umt5/norm/scale"] != held[STEPS]["umt5_ema/norm/scale"])


def test_what_is_saved_is_what_is_trained(options):
  p = planned(options)
  numbers = iter(range(999))
  part = jax.tree.map(lambda x: next(numbers), p.part_shapes("student"))
  held = items.items_of(p, {"student": part}, None)
  assert {*held} == {"student", "umt5", "ema", "umt5_ema", "optimizers"}
  assert held["umt5_ema"] == part.ema["text"] and held["student"] == part.params["student"]
  assert items.parts_of(p, {"student": p.part_shapes("student")}, held) == {"student": part}
  assert items.models_of(p) == {"umt5": dataclasses.asdict(TEXT)}


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_had_not_been(whole, held, options, tmp_path, capsys):
  command = [*options, f"--workdir={tmp_path}"]
  with each_batch(asks(2)):
    assert train.main(command) == 0
  assert train.main(command) == 0
  assert "Going on after step 2." in said(capsys)
  assert metrics(tmp_path) == metrics(whole[0])
  assert_same_arrays(arrays(tmp_path, STEPS)[0], held[STEPS])


def test_videos_are_of_the_weights_that_are_shown(options, held, tokenizer, monkeypatch, tmp_path):
  p, seen = planned(options), []
  trained = {averaged: text_of(held[STEPS], f"umt5{'_ema' * averaged}") for averaged in (0, 1)}

  class Stage:
    student = staticmethod(lambda averaged: averaged)
    text = staticmethod(lambda averaged: trained[averaged])

  def write(plan, model, *rest):
    seen.append((model.params, np.asarray(model.encode(PROMPTS))))
    return [], []

  monkeypatch.setattr(validation, "_write", write)
  encoder = weights.Encoder(p)
  encoder.remember(PROMPTS)  # which would be of weights that are gone
  validation.make_videos(p, Stage, encoder, None, 1, tmp_path, None, print)
  assert [averaged for averaged, _ in seen] == [False, True]
  for averaged, rows in seen:
    want = contexts(trained[averaged], tokenizer, PROMPTS)
    np.testing.assert_allclose(rows, want, rtol=0, atol=1e-6)
  assert np.any(seen[0][1] != seen[1][1])


def test_prompts_that_are_cut_are_told_of(options, tmp_path, capsys):
  long = "a red blob moves to the left and up and down"
  data = videos(tmp_path / "data", prompts=(long, "b", "c", "d"))
  p, told = planned(options, data), []
  feed = Feed(p, weights.Encoder(p), tmp_path, told.append)
  for _ in range(4):
    feed()
  surplus = weights.Encoder(p).surplus(long)
  assert told == [f"The last {surplus} tokens of {long!r} are cut off."] and feed.cut == 1


# What others make of it


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
  """A folder with an autoencoder alone."""
  place, kind = tmp_path_factory.mktemp("beside") / "vae", KINDS["vae"]
  r = np.random.default_rng(0)
  tree = named(jax.eval_shape(lambda: vae.init_params(VAE, jax.random.key(0))))
  drawn = {k: np.float32(r.normal(size=x.shape)) for k, x in tree.items()}
  read = lambda x: lambda row=None: x if row is None else x[row]
  table = {k: Tensor(x.shape, x.dtype, read(x)) for k, x in drawn.items()}
  part = Part(kind, VAE, named_tensors(kind.table(VAE), table), None, {"files": {}})
  place.mkdir()
  checkpoint.write_part(part, place, "hfjax", None, lambda count: None)
  return place.parent


@pytest.mark.parametrize("averaged", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_prompts_have_the_contexts_of_training(
  whole, held, tokenizer, beside, tmp_path, averaged, capsys
):
  folder = shutil.copytree(beside, tmp_path / "all")
  args = [str(whole[0]), str(folder), "--overwrite", "--quiet", *["--ema"] * averaged]
  assert convert_checkpoint.main(args) == 0
  assert capsys.readouterr().err == ""
  assert sorted(x.name for x in folder.iterdir()) == ["dit", "google", "umt5", "vae"]
  kept = (tokenizer / "spiece.model").read_bytes()
  assert (folder / "google" / "umt5-xxl" / "spiece.model").read_bytes() == kept
  for name in ("dit", "umt5"):
    told = json.loads((folder / name / "config.json").read_text())["origin"]
    assert told["step"] == STEPS and told["averaged"] == averaged
  model, item = pipeline.load(folder, dtype="float32"), "ema" if averaged else "student"
  want = {k: x for k, x in held[STEPS].items() if k.split("/")[0] == item}
  assert_same_arrays({f"{item}/{k}": x for k, x in named(model.params).items()}, want)
  want = contexts(text_of(held[STEPS], "umt5_ema" if averaged else "umt5"), tokenizer, PROMPTS)
  np.testing.assert_allclose(model.encode(PROMPTS), want, rtol=0, atol=1e-6)
  assert model.config == SMALL and np.any(want)


def test_a_run_is_complete(whole, tokenizer):
  """Its tokenizer lies in it, so that the one it was given may go."""
  kept = whole[0] / "tokenizer" / "spiece.model"
  assert kept.read_bytes() == (tokenizer / "spiece.model").read_bytes()


def test_later_stages_take_the_run(whole, held, tokenizer):
  argv = [x.replace("smoke_flow", "smoke_stage1") for x in FLOW if ".flow." not in x]
  argv += [f"--config.{name}.weights={whole[0]}" for name in ("text", "teacher", "critic")]
  p = plan.make_plan(config.parse([*argv, "--workdir=unused", f"--config.init={whole[0]}"]).config)
  assert p.stage == "dmd" and p.text is None and p.teacher == SMALL
  want = contexts(text_of(held[STEPS]), tokenizer, PROMPTS)
  np.testing.assert_allclose(weights.Encoder(p)(PROMPTS), want, rtol=0, atol=1e-6)
  teacher = named(weights.load_teacher(p))
  for name, x in teacher.items():
    want = held[STEPS][f"student/{name}"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(x, want, err_msg=name)


@pytest.mark.slow
def test_another_run_begins_with_both(whole, held, options):
  more = [f"--config.text.weights={whole[0]}", "--config.text.tokenizer="]
  more.append(f"--config.init={whole[0]}")
  q = planned(options, *more)
  assert q.text == TEXT and weights.tokenizer_folder(q) == whole[0]
  begin = weights.load_trained(q, "student")
  for item, part in (("student", "student"), ("umt5", "text")):
    got = {f"{item}/{k}": x for k, x in named(begin[part]).items()}
    assert_same_arrays(got, {k: x for k, x in held[STEPS].items() if k.split("/")[0] == item})


# What cannot work


@pytest.mark.parametrize(
  ("more", "status", "words"),
  [
    (["text.tokenizer="], 1, "random:small has no tokenizer; give the folder of one as text.tok"),
    (["text.tokenizer=/nowhere"], 1, "text.tokenizer of the config cannot be used. There is no f"),
    (["text.tokenizer=/"], 1, "text.tokenizer of the config cannot be used. / holds no tokenizer"),
    (["text.weights=random:none"], 2, "There is no text encoder 'none' to draw weights for; ch"),
    (["text.weights=random:shapes"], 2, "gives rows of 128 numbers, and the student takes 12"),
    (["text.weights=/nowhere"], 1, "text.weights of the config cannot be used. /nowhere is neit"),
    (["lora.rank=2"], 2, "leave it out, or set stage to flow and lora.rank to 0"),
    (["stage=ode"], 2, "flow.train_text_encoder is set, which the stage flow knows without ada"),
  ],
)
def test_what_cannot_work_is_refused_in_a_sentence(options, tmp_path, capsys, more, status, words):
  argv = [*options, f"--workdir={tmp_path / 'run'}", *(f"--config.{x}" for x in more)]
  assert train.main(argv) == status
  (line,) = said(capsys)
  assert line.startswith("train: ") and words in line and line.endswith(".")


def test_tokenizers_with_more_ids_than_the_encoder_are_refused(options, tmp_path, capsys):
  (tmp_path / "spiece.model").write_bytes(vocabulary.train(["x y z " * 9, "abc def ghi"], 160))
  with pytest.MonkeyPatch.context() as patch:
    few = Umt5Config(vocab=20, dim=12, dim_attn=8, dim_ffn=8, heads=2, layers=1)
    patch.setitem(umt5.PRESETS, "small", few)
    argv = [*options, f"--workdir={tmp_path}/run", f"--config.text.tokenizer={tmp_path}"]
    assert train.main(argv) == 1
  assert "ids, and the text encoder knows 20; use the tokenizer" in said(capsys)[-1]
