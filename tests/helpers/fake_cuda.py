"""CUDA tensors without a GPU: shapes, dtypes and devices as a GPU has them, and no values.

Tensors of the CPU are real. Those of the GPU are torch's fake tensors, which raise where a tensor
of the CPU meets one of the GPU, where an operation refuses a dtype, and where the host would wait
for a value (`.item()`, a mask as an index). `FakeCuda.waits` has the copies for which it waits.
A build of torch without CUDA lacks four things for them, which `fake_cuda` adds: a device guard, a
current device, autocast, and a backward.
"""

import ctypes
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA, META, DEVICES = 1, 14, 20
"""Places of c10::DeviceType, and a number of them that all releases have."""
MATRIX_PRODUCTS = {torch.ops.aten.mm.dtype_out, torch.ops.aten.addmm.dtype_out}
HALF = {torch.float16, torch.bfloat16}


class FakeCuda(TorchDispatchMode):
    """Operations with tensors of the GPU run on fake ones, all others as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.device = 0
        """The current device."""
        self.waits: list[str] = []
        """Copies between CPU and GPU for which the host waits, each with its place in the code."""
        self.pinned: list[Tensor] = []
        self.memory: Memory | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") == torch.device("meta"):  # "cuda" without a number, see `guarded`
            kwargs = kwargs | {"device": torch.device("cuda", self.device)}
        given = tree_leaves((args, kwargs))
        if not any(isinstance(x, FakeTensor) or is_cuda(x) for x in given):
            return func(*args, **kwargs)
        if func in MATRIX_PRODUCTS:
            return matrix_product(*args, **kwargs)
        with self.fake:
            found = func(*args, **kwargs)
        if self.memory is not None:
            self.memory.add(found)
        copy = func._opname in ("_to_copy", "copy_")
        non_blocking = copy and True in (kwargs.get("non_blocking"), *args[2:])
        # A number is passed by value, except where it is what is copied.
        few = 0 if copy else 1
        tensors = [x for x in [*given, *tree_leaves(found)] if isinstance(x, Tensor)]
        places = {x.device.type for x in tensors if x.ndim >= few}
        if len(places) > 1 and not non_blocking:
            self.waits.append(f"{func} in {caller()}")
        return found

    def pin(self, tensor: Tensor) -> Tensor:
        """`Tensor.pin_memory`, which wants a driver."""
        self.pinned.append(tensor)
        return tensor

    def exchange(self, index: int) -> int:
        """Make another device the current one, as `torch.cuda.device` does; returns the last."""
        if index < 0:
            return -1
        before, self.device = self.device, index
        return before


class Memory:
    """Bytes of the GPU that tensors hold: now, and at most since `peak` was set."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def add(self, made: Any) -> None:
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.device.type == "cuda":
                storage = tensor.untyped_storage()
                self.held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.now())

    def now(self) -> int:
        self.held = {at: one for at, one in self.held.items() if not one[0].expired()}
        return sum(size for _, size in self.held.values())


def caller() -> str:
    """File and line of the innermost call that is not torch's or a helper's."""
    frames = traceback.extract_stack()
    own = [x for x in frames if "/torch/" not in x.filename and x.filename != __file__]
    return f"{own[-1].filename}:{own[-1].lineno}"


def is_cuda(value: Any) -> bool:
    return isinstance(value, torch.device) and value.type == "cuda"


def matrix_product(*matrices: Any, out: Tensor, **_: Any) -> Tensor:
    """`torch.mm` or `torch.addmm` with `out_dtype`, as ATen/native/cuda/Blas.cpp checks them.

    torch 2.11 has no fake form of the second.
    """
    *start, one, other, dtype = matrices
    assert one.dtype == other.dtype
    assert dtype == one.dtype or (dtype == torch.float32 and one.dtype in HALF)
    assert out.dtype == dtype
    assert all(x.dtype in (dtype, one.dtype) for x in start)
    assert all(x.shape == out.shape for x in start)
    assert out.shape == (one.shape[0], other.shape[1])
    assert one.shape[1] == other.shape[0]
    assert {x.device for x in (*start, one, other)} == {out.device}
    return out


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Within it, "cuda" is a device, and `Tensor.backward` works on it."""
    mode = FakeCuda()
    with ExitStack() as stack:
        if not torch.cuda.is_available():
            stack.enter_context(guarded())
            for name, instead in {
                "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
                "torch.cuda.is_bf16_supported": lambda *_, **__: True,
                "torch.cuda._lazy_init": lambda: None,
                "torch.cuda.set_device": lambda _: None,
                "torch.cuda.get_device_capability": lambda _=None: (9, 0),
                "torch.cuda._exchange_device": mode.exchange,
                "torch.cuda._maybe_exchange_device": mode.exchange,
            }.items():
                stack.enter_context(patch(name, instead))
            stack.enter_context(patch.object(Tensor, "pin_memory", lambda x: mode.pin(x)))
        stack.enter_context(patch.object(Tensor, "backward", backward))
        yield stack.enter_context(mode)


@contextmanager
def guarded() -> Iterator[None]:
    """Autograd may note that a tensor is on a GPU: with the guard of "meta", which does nothing."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    name = "_ZN3c104impl26device_guard_impl_registryE"
    guards = (ctypes.c_void_p * DEVICES).in_dll(library, name)
    before, lifted = guards[CUDA], torch._C._only_lift_cpu_tensors()
    guards[CUDA] = guards[META]
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda")
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)
        guards[CUDA] = before


@torch.no_grad()
def backward(root: Tensor, gradient: Tensor | None = None, **_: Any) -> None:
    """`root.backward()` node by node, because torch's engine asks the driver for its devices."""
    first: Any = root.grad_fn
    waiting: dict[Any, int] = {first: 0}  # gradients that a node waits for
    nodes = [first]
    for node in nodes:
        for after, _number in node.next_functions:
            if after is not None and after not in waiting:
                waiting[after] = 0
                nodes.append(after)
            if after is not None:
                waiting[after] += 1
    given: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    given[first][0] = torch.ones_like(root) if gradient is None else gradient
    ready = [first]
    while ready:
        node = ready.pop()
        found = run(node, given.pop(node, {}))
        for (after, at), value in zip(node.next_functions, found, strict=False):
            if after is None:
                continue
            if value is not None:
                wanted = after._input_metadata[at]
                assert value.device == wanted.device
                value = value.sum_to_size(wanted.shape).to(wanted.dtype)
                before = given[after].get(at)
                given[after][at] = value if before is None else before + value
            waiting[after] -= 1
            if not waiting[after]:
                ready.append(after)


def run(node: Any, given: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients that a node makes of those given for some of its outputs."""
    if not given:
        return (None,) * len(node.next_functions)
    call: Callable[..., Any] = node if callable(node) else node.apply  # of an autograd.Function
    found = call(*(given.get(at) for at in range(len(node._input_metadata))))
    return found if isinstance(found, tuple) else (found,)


class FakeRows:
    """In place of `losses_triton._rows`: checks what a launch would read and write."""

    def __init__(self, kernel: Any, mode: FakeCuda) -> None:
        self.names, self.mode = kernel.arg_names, mode
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self.launch, grid)

    def launch(
        self, grid: tuple[int, ...], *arguments: Any, num_warps: int, **constants: Any
    ) -> None:
        given = dict(zip(self.names, arguments, strict=False)) | constants
        assert list(given) == self.names
        assert num_warps in (1, 2, 4, 8, 16)
        self.launches.append(given)
        (rows,), k, v = grid, given["K"], given["V"]
        tensors = {name: value for name, value in given.items() if name.endswith("_ptr")}
        devices = {x.device for x in tensors.values()}
        assert devices == {torch.device("cuda", self.mode.device)}  # Triton takes the current one
        for name, columns in [("z", v), ("grad", v)]:
            matrix = tensors.pop(f"{name}_ptr")
            assert matrix.shape == (rows, columns)
            assert matrix.stride() == (given[f"{name}_stride"], 1) or rows == 1
            assert matrix.is_floating_point()
        for name, tensor in tensors.items():
            assert tensor.is_contiguous()
            assert tensor.numel() == rows * (k if name in ("ids_ptr", "logprobs_ptr") else 1)
            assert tensor.dtype == (torch.int64 if name == "ids_ptr" else torch.float32)
        assert given["ENTRIES"] >= max(k, 1)
        assert given["ENTRIES"].bit_count() == given["SIZE"].bit_count() == 1
