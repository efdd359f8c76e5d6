"""What autograd keeps in place of a saved tensor: the tensor itself, or how to compute it again."""

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

_peeked = threading.local()
PLAIN = (Tensor, torch.nn.Parameter)
Key = tuple[Any, ...]


class Formula(Protocol):
    """How to compute a map from others that the graph keeps anyway."""

    layout: tuple[Any, ...]  # shape, dtype and device
    kind: tuple[Any, ...]  # what the operators depend on
    depth: int  # how many maps it needs at once that are computed themselves, its own among them

    def compute(self) -> Tensor: ...


class Box:
    """One saved tensor, shared by all that save it.

    A tensor that was changed in place since is refused, as autograd does where no hooks are at work. A computed one is
    kept from its first use until all that saved it have had it, so that it is computed once.
    """

    __slots__ = (
        "__weakref__", "formula", "packed", "ready", "storage", "strides", "tensor", "uses", "uses_left", "version",
    )  # fmt: skip

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor
        self.formula: Formula | None = None
        self.version = tensor._version
        self.storage: StorageWeakRef | None = None
        self.strides: tuple[int, ...] = ()  # of a tensor that is computed
        self.packed: Any = None  # as other hooks packed it
        self.ready: Tensor | None = None
        self.uses = self.uses_left = 0

    @property
    def depth(self) -> int:
        return 0 if self.formula is None else self.formula.depth

    @property
    def is_changed(self) -> bool:
        """Whether the tensor was changed in place since it was saved."""
        return self.tensor is not None and self.tensor._version != self.version

    @property
    def layout(self) -> tuple[Any, ...]:
        return layout_of(self.get()) if self.formula is None else self.formula.layout

    @property
    def kind(self) -> tuple[Any, ...]:
        """What the bits of an operator on this tensor may depend on, but for the values."""
        strides = self.get().stride() if self.formula is None else self.strides
        shape, dtype, device = self.layout
        return dtype, device, len(shape), strides[1] == 1, strides[-1] == 1

    def add_use(self) -> None:
        """Count one more that saves this tensor."""
        self.uses += 1
        self.uses_left += 1

    def compute_later(self, formula: Formula) -> None:
        """Keep a formula from now on, and not the tensor."""
        if self.tensor is not None:
            self.strides = self.tensor.stride()
            # held, so that its address is given to no other storage while this box may be found by it
            self.storage = weak_reference(self.tensor)
        self.tensor, self.formula = None, formula

    def hand_over(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
        """Keep the tensor as the user's own hooks do, unless it is computed, or was changed meanwhile."""
        if self.tensor is not None and not self.is_changed:
            self.packed = pack(self.tensor), unpack
            self.tensor = None

    def unpack(self) -> Tensor:
        """Return the tensor to one of those that saved it."""
        tensor = self.get()
        self.uses_left -= 1
        if self.uses_left <= 0:  # the next backward pass, if there is one, begins anew
            self.ready, self.uses_left = None, self.uses
        return tensor

    def get(self) -> Tensor:
        """Return the tensor.

        Raises:
            RuntimeError: If it was changed in place since it was saved.
        """
        if self.packed is not None:
            packed, unpack = self.packed
            return unpack(packed)  # type: ignore[no-any-return]
        if self.formula is None:
            assert self.tensor is not None
            if self.is_changed:
                raise RuntimeError(_changed(self.tensor, self.version))
            return self.tensor
        ready = self.ready
        if ready is None:  # another thread may drop it meanwhile
            self.ready = ready = self.compute()
        return ready

    def compute(self) -> Tensor:
        """Return the tensor, a computed one without keeping it."""
        if self.formula is None:
            return self.get()
        with torch.no_grad():
            computed = self.formula.compute()
            if computed.stride() != self.strides:
                computed = computed.new_empty_strided(computed.shape, self.strides).copy_(computed)
        return computed


def unpack(box: Box) -> Tensor:
    """Give a saved tensor back; while `peek` is at work, only note the box."""
    boxes = getattr(_peeked, "boxes", None)
    if boxes is None:
        return box.unpack()
    boxes.append(box)
    return torch.empty(0)


def peek(read: Callable[[], object]) -> list[Box]:
    """Return the boxes of the saved tensors that ``read`` reads from a node."""
    boxes: list[Box] = []
    _peeked.boxes = boxes
    try:
        read()
    finally:
        _peeked.boxes = None
    return boxes


def layout_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return what the parts of a sum must have in common."""
    return tensor.shape, tensor.dtype, tensor.device


def key_of(tensor: Tensor) -> Key | None:
    """Return what equal saved tensors have in common, None if that cannot be told.

    It holds as long as the storage, or a weak reference to it, is held: the address of a freed one can come again.
    """
    if type(tensor) not in PLAIN or tensor.is_nested or tensor.layout is not torch.strided:
        return None
    if tensor.is_neg() or tensor.is_conj():
        return None
    place = tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
    return (tensor.untyped_storage()._cdata, tensor._version, *place)


def weak_reference(tensor: Tensor) -> StorageWeakRef:
    """Refer to a tensor's storage without keeping it."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def version_of(tensor: Tensor) -> Tensor:
    """Return a tensor without values that shares the version counter of ``tensor``, and does not keep its storage."""
    version = tensor.detach()
    version.data = tensor.new_empty(0)
    return version


def _changed(tensor: Tensor, version: int) -> str:
    return (
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected version {version} instead. "
        "It is kept for backward, or a map that syncbn.save_memory computes again depends on it."
    )
