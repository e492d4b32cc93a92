"""Runs Triton kernels in Triton's interpreter, on the processor, in place of jax-triton."""

import importlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from pallas_kernels import triton as backend
from pallas_kernels import triton_kernels, triton_map_kernels

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
         "int32": torch.int32}  # fmt: skip


def interpret(monkeypatch):
  """From now on kernels run in the interpreter, even if Triton was imported long ago.

  Returns the list that their launches are added to.
  """
  monkeypatch.setenv("TRITON_INTERPRET", "1")
  for module in (triton_kernels, triton_map_kernels, tl, tl.standard):
    for name, function in list(vars(module).items()):
      if isinstance(function, JITFunction):
        monkeypatch.setattr(module, name, interpreter.InterpretedFunction(function.fn))
  mend(monkeypatch)
  seen = []

  def call(launch):
    seen.append(launch)
    return run(launch, monkeypatch)

  monkeypatch.setattr(backend, "call", call)
  return seen


def mend(monkeypatch):
  """What the interpreter of Triton 3.6 does wrong.

  Of bfloat16 it multiplies the bits, and it rounds to it towards zero. It takes arrays of one
  number for scalars, which NumPy no longer does.
  """
  builder = interpreter.InterpreterBuilder
  dot, cast, patch_tensor = builder.create_dot, builder.cast_impl, interpreter._patch_lang_tensor

  def number(x):
    return x.data.view(ml_dtypes.bfloat16) if x.dtype.scalar == tl.bfloat16 else x.data

  def widened(x):
    return interpreter.TensorHandle(number(x).astype(np.float32), tl.float32)

  def round_to(self, x, dtype, *_):
    if dtype.scalar == tl.bfloat16:
      bits = number(x).astype(ml_dtypes.bfloat16).view(np.uint16)
      return interpreter.TensorHandle(bits, tl.bfloat16)
    return cast(self, widened(x) if x.dtype.scalar == tl.bfloat16 else x, dtype)

  monkeypatch.setattr(
    builder, "create_dot", lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
  )
  monkeypatch.setattr(builder, "cast_impl", round_to)
  monkeypatch.setattr(builder, "create_fp_to_fp", round_to)

  def patched(tensor, scope):
    patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

  monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


def run(launch, monkeypatch):
  """Outputs of a launch, as jax-triton would pass its arguments; no address may be outside."""
  arrays = [tensor(x) for x in launch.arrays]
  outputs = [junk(x.shape, TORCH[str(x.dtype)]) for x in launch.outputs]
  kernels = importlib.import_module(f"pallas_kernels.{launch.module}")
  builder = interpreter.InterpreterBuilder
  with monkeypatch.context() as patch:
    load, store = builder.create_masked_load, builder.create_masked_store

    def checked_load(self, pointers, mask, *rest):
      assert_inside(pointers.data[mask.data], arrays)
      return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
      assert_inside(pointers.data[mask.data], outputs)
      return store(self, pointers, value, mask, *rest)

    patch.setattr(builder, "create_masked_load", checked_load)
    patch.setattr(builder, "create_masked_store", checked_store)
    with np.errstate(divide="ignore", invalid="ignore"):
      getattr(kernels, launch.kernel)[launch.grid](*arrays, *outputs, **launch.constants)
  return [
    jnp.asarray((x.float() if x.dtype == torch.bfloat16 else x).numpy()).astype(like.dtype)
    for x, like in zip(outputs, launch.outputs, strict=True)
  ]


def tensor(x):
  wide = np.asarray(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x)
  return torch.from_numpy(wide.copy()).to(TORCH[str(x.dtype)])


def junk(shape, dtype):
  return torch.full(shape, float("nan") if dtype.is_floating_point else -(10**9), dtype=dtype)


def assert_inside(pointers, tensors):
  inside = np.zeros(pointers.shape, bool)
  for x in tensors:
    inside |= (pointers >= x.data_ptr()) & (pointers < x.data_ptr() + x.nbytes)
  assert inside.all(), "a kernel touches memory that is not its own"
