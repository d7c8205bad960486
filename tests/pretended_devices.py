"""Devices that a machine without GPUs can pretend to have.

Tensors are computed on the CPU, and each says which device it is on. An operation on tensors of two devices raises, as
it would on GPUs, and copies between devices are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
# They read tensors of several devices: one moves what it reads, the others take indices from the CPU.
_COPIES = {"aten::copy_", "aten::_to_copy"}
_INDEXED = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_unsafe_index"}
_MOVES = {"to", "cpu", "cuda", "as_tensor"}


class PretendedDevices:
    """While it is entered, tensors have devices such as "cuda:1" that are not there.

    Attributes:
        copies: elements copied from one device to another, by (source, target).
        operations: operations by device.
    """

    def __init__(self) -> None:
        self.copies: Counter[tuple[str, str]] = Counter()
        self.operations: Counter[str] = Counter()
        # A storage's device. Those that C++ makes without saying where (zeros of a backward pass) have none, and go
        # with any.
        # No address comes again as long as a weak reference to it is held.
        self._devices: dict[int, tuple[StorageWeakRef, torch.device]] = {}
        self._modes = (_Dispatch(self), _Functions(self))

    def __enter__(self) -> PretendedDevices:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def put(self, tensor: Tensor, device: torch.device | str) -> None:
        """Says that ``tensor`` is on ``device``."""
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
            self._devices[storage._cdata] = StorageWeakRef(storage), torch.device(device)

    def put_module(self, module: nn.Module, device: torch.device | str) -> None:
        """The same of all parameters and buffers of ``module``."""
        for tensor in (*module.parameters(), *module.buffers()):
            self.put(tensor, device)

    def device(self, tensor: Tensor) -> torch.device:
        return self.known(tensor) or CPU

    def known(self, tensor: Tensor) -> torch.device | None:
        with torch._C.DisableTorchFunction():
            return self._devices.get(tensor.untyped_storage()._cdata, (None, None))[1]

    def moved(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A copy on ``device``, whose gradient goes back to where ``tensor`` is."""
        return tensor if self.device(tensor) == device else _Move.apply(tensor, self, device)

    def copied(self, tensor: Tensor, device: torch.device) -> Tensor:
        self.copies[str(self.device(tensor)), str(device)] += tensor.numel()
        copy = tensor.detach().clone()
        self.put(copy, device)
        return copy

    def common(self, name: str, tensors: Iterable[Tensor]) -> torch.device | None:
        """The device of an operation's tensors; numbers on the CPU go with any."""
        tensors = list(tensors)
        placed = {self.known(x) for x in tensors if x.ndim or self.device(x) != CPU} - {None}
        if len(placed) > 1:
            raise RuntimeError(f"{name}: expected all tensors on one device, got {sorted(map(str, placed))}")
        return next(iter(placed), next((self.known(x) for x in tensors), None))


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, devices: PretendedDevices, device: torch.device) -> Tensor:
        ctx.devices, ctx.source = devices, devices.device(x)
        return devices.copied(x, device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.devices.copied(gradient, ctx.source), None, None


class _Dispatch(TorchDispatchMode):
    def __init__(self, devices: PretendedDevices) -> None:
        super().__init__()
        self.devices = devices

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        name, devices = function._schema.name, self.devices
        result = function(*args, **kwargs)
        if name in _COPIES and len(given) == 2 and devices.known(given[0]) is not None:
            devices.copies[str(devices.device(given[1])), str(devices.device(given[0]))] += given[0].numel()
            return result
        if name in _INDEXED:
            given = [given[0], *(x for x in given[1:] if devices.device(x) != CPU)]
        place = devices.common(name, given)
        devices.operations[str(place)] += 1
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and place is not None and devices.known(x) is None:
                devices.put(x, place)
        return result


class _Functions(TorchFunctionMode):
    def __init__(self, devices: PretendedDevices) -> None:
        super().__init__()
        self.devices = devices

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        devices = self.devices
        if function == Tensor.device.__get__:  # type: ignore[attr-defined]
            return devices.device(args[0])
        if function == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return devices.device(args[0]).type == "cuda"
        name = getattr(function, "__name__", "")
        if name == "record_stream":
            return None
        if name in _MOVES and args and isinstance(args[0], Tensor):
            return self._move(function, name, args, kwargs)
        made_on = None
        if not any(isinstance(x, Tensor) for x in tree_leaves((args, kwargs))) or kwargs.get("device") is not None:
            made_on = torch.device(kwargs.get("device") or CPU)
        if made_on is not None and kwargs.get("device") is not None:
            kwargs["device"] = CPU
        result = function(*args, **kwargs)
        if made_on is not None:
            tree_map(lambda x: devices.put(x, made_on) if isinstance(x, Tensor) else None, result)
        return result

    def _move(self, function: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Any:
        devices, x = self.devices, args[0]
        if name in ("cpu", "cuda"):
            return devices.moved(x, CPU if name == "cpu" else torch.device("cuda:0"))
        target = kwargs.pop("device", None)
        rest = []
        for argument in args[1:]:
            if isinstance(argument, (torch.device, str)):
                target = argument
            elif isinstance(argument, Tensor):
                target = devices.device(argument)
                rest.append(argument.dtype)
            else:
                rest.append(argument)
        copy = kwargs.pop("copy", False)
        own = devices.device(x)
        rest = [y for y in rest if isinstance(y, torch.dtype)]
        dtypes = {"dtype": rest[0]} if rest else {key: kwargs["dtype"] for key in ("dtype",) if kwargs.get(key)}
        target = own if target is None else torch.device(target)
        target = torch.device("cuda:0") if target == torch.device("cuda") else target
        result = function(x, **dtypes) if dtypes else x
        if target != own:
            return devices.moved(result, target)
        return result.clone() if copy and result is x else result
