import pytest
from hypothesis import given
from hypothesis import strategies as st

import pallas_kernels
from hfjax.models.geometry import VARIANTS, Geometry
from hfjax.models.presets import PRESETS, WanConfig, preset
from hfjax.streaming.config import StreamConfig
from tests.helpers import MODEL, stream_config


def kept_blocks(g, frames):
  """Key blocks that are kept, by valid past frames."""
  past = g.valid_keys(frames)
  current = [[frames * g.tokens] * len(past)] if g.semantics.split_blocks else []
  return pallas_kernels.kept_counts(g.ratio, past, *current, block=g.block)


def test_kept_blocks_of_the_published_sizes():
  """Spec section 5 and design: 832 x 480, ratio 0.2."""
  paper = Geometry(60, 104)
  assert paper.tokens == 1560
  assert [kept_blocks(paper, 3)[n] for n in (0, 3, 6)] == [14, 29, 44]
  reference = Geometry(60, 104, variant="reference_train")
  assert [kept_blocks(reference, 3)[n] for n in (0, 3, 6)] == [14, 29, 44]
  # One block fewer where past and current are cut as one row: 220 against 221.
  tenth = {v: kept_blocks(Geometry(60, 104, ratio=1 / 221, variant=v), 3)[6] for v in VARIANTS}
  assert tenth["paper"] == 1
  assert kept_blocks(Geometry(60, 104, ratio=1 / 13), 3)[6] == 17  # 221 / 13
  thirteenth = Geometry(60, 104, ratio=1 / 13, variant="reference_infer")
  assert kept_blocks(thirteenth, 3)[6] == 16


@given(
  st.floats(0, 1, exclude_min=True), st.integers(0, 6), st.integers(1, 4), st.integers(0, 5),
  st.integers(1, 9), st.sampled_from([4, 64]),
)  # fmt: skip
def test_every_list_holds_a_block_and_no_more_than_there_are(ratio, s, c, p, cells, block):
  g = Geometry(2 * cells, 4, chunk=c, window=s + c + p, sink=s, ratio=ratio, block=block)
  for frames in range(1, c + 1):
    for past, kept in enumerate(kept_blocks(g, frames)):
      blocks = -(-past * g.tokens // block) + -(-frames * g.tokens // block)
      assert kept == max(1, int(ratio * blocks)) <= blocks
  assert g.past == s + p and g.previous == p


def test_window_of_minus_one_is_the_rotary_cap():
  assert Geometry(4, 6, window=-1, rope_cap=15).window == 15


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    ({"window": 5}, "window of 5 frames cannot hold the sink of 3 and a chunk of 3; make the "
     "window at least 6"),
    ({"window": 22}, "window of 22 frames is longer than the rotary cap of 21"),
    ({"height": 5}, "5 rows, which the patch of 2 does not divide; use a positive multiple of 2"),
    ({"width": 0}, "0 columns"),
    ({"ratio": 0.0}, r"ratio of key blocks is 0.0; it must lie in \(0, 1\]"),
    ({"ratio": 1.5}, "is 1.5"),
    ({"ratio": float("nan")}, "is nan"),
    ({"chunk": 0}, "chunk of 0 frames"),
    ({"sink": -1}, "sink of -1 frames"),
    ({"block": 0}, "block is 0 tokens"),
    ({"window": 9.5}, "window is 9.5; it must be a whole number"),
    ({"height": "4"}, "height is '4'"),
    ({"chunk": True}, "chunk is True"),
    ({"patch": (0, 2)}, r"patch is \(0, 2\)"),
    ({"patch": 2}, "patch is 2; give positive numbers"),
    ({"ratio": "0.5"}, "is 0.5; it must lie in"),
    ({"rope_cap": 0}, "rotary cap is 0 frames"),
    ({"variant": "papers"}, "Unknown variant 'papers'; choose one of paper"),
  ],
)  # fmt: skip
def test_impossible_geometries_are_refused(change, sentence):
  with pytest.raises(ValueError, match=sentence):
    Geometry(**{"height": 4, "width": 6, **change})


def test_frames_must_fill_whole_chunks():
  g = Geometry(4, 6)
  assert g.num_chunks(12) == 4
  with pytest.raises(ValueError, match="13 frames .* multiple of the chunk of 3; ask for 12 or 15"):
    g.num_chunks(13)
  with pytest.raises(ValueError, match="2 frames .* ask for 3"):
    g.num_chunks(2)
  with pytest.raises(ValueError, match="0 frames"):
    g.num_chunks(0)


def test_memory_positions_must_not_be_negative():
  with pytest.raises(ValueError, match="cap of at least 12 frames, and it is 11"):
    stream_config(window=9, sink=0, rope_cap=11)
  stream_config(window=9, sink=0, rope_cap=12)
  # Without a memory nothing is absorbed, so nothing needs a position.
  dense = WanConfig(**{**MODEL.__dict__, "linear": False})
  stream_config(model=dense, window=9, sink=0, rope_cap=11)


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    ({"steps": ()}, "list of denoising steps is empty"),
    ({"steps": (500, 1000)}, "do not descend"),
    ({"steps": (1000, 0)}, "must lie in"),
    ({"steps": (1001,)}, "denoising step is 1001; it must be a number from 0 to 1000"),
    ({"steps": (500.5,)}, "step 500.5 is no whole number"),
    ({"steps": (0.0,), "warp": False}, "must lie in"),
    ({"dtype": "float16"}, "'float16'; choose float32 or bfloat16"),
    ({"shift": -1.0}, "shift is -1.0"),
    ({"shift": float("nan")}, "shift is nan"),
    ({"context_timestep": -5}, "context_timestep is -5; it must be a number from 0 to 1000"),
    ({"guidance": -1}, "guidance is -1; it must be a number from 0 to 100"),
    ({"guidance": None}, "guidance is None"),
    ({"solver": "unipc"}, "solver is a str; give a MultistepSolver"),
    ({"steps": 1000}, "steps are 1000; give a list"),
    ({"steps": (1000, None)}, "A denoising step is None"),
    ({"model": None}, "needs a WanConfig and a Geometry, and got NoneType"),
  ],
)
def test_impossible_streams_are_refused(change, sentence):
  with pytest.raises(ValueError, match=sentence):
    StreamConfig(**{"model": MODEL, "geometry": Geometry(4, 6), **change})


def test_a_patch_other_than_the_models_is_refused():
  with pytest.raises(ValueError, match=r"patch is \(2, 2\) and the geometry's \(1, 1\)"):
    StreamConfig(MODEL, Geometry(4, 6, patch=(1, 1)))


def test_image_to_video_networks_do_not_stream():
  with pytest.raises(ValueError, match="takes 36 channels"):
    StreamConfig(PRESETS["wan-i2v-14b"], Geometry(4, 6))


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    ({"dim": 30, "heads": 2}, "head dimension is 15"),
    ({"dim": 32, "heads": 3}, "width of 32 does not divide into 3 heads"),
    ({"layers": 0}, "layers is 0"),
    ({"layers": 2.5}, "layers is 2.5; it must be a whole number"),
    ({"patch": (2,)}, "patch is"),
    ({"eps": float("nan")}, "eps is nan"),
    ({"freq_dim": 15}, "15 wide"),
  ],
)
def test_impossible_networks_are_refused(change, sentence):
  with pytest.raises(ValueError, match=sentence):
    WanConfig(**{**MODEL.__dict__, **change})


def test_an_unknown_preset_names_the_known_ones():
  with pytest.raises(ValueError, match="'wan'; choose one of wan-1.3b"):
    preset("wan")
