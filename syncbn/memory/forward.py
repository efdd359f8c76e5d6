"""One forward pass: find the maps that can be computed again, while autograd saves them."""

from types import FrameType
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm

from . import normalization
from .boxes import PLAIN, Box, Formula, Key, key_of, layout_of, peek, unpack, version_of, weak_reference
from .formulas import ACTIVATIONS, SAVES_INPUT, Activated, Kept, Sum

_MAX_DEPTH = 4  # so many maps of a chain of residual sums are there at once in backward, and every fifth is kept
_MAX_LEVELS = 4  # of a formula: activations and sums within each other
_equal: dict[tuple[Any, ...], bool] = {}  # by kind of formula: whether it gave the bits of the forward pass


class Seen(NamedTuple):
    """A tensor that went into a module or came out of one: its key, and what shows whether it was changed since."""

    key: Key
    storage: StorageWeakRef
    version: Tensor | None  # without values, but with the tensor's counter of changes; only if it has a formula


class Forward:
    """The saved tensors and autograd nodes of one forward pass of a model.

    A saved tensor is packed into a box when an operator saves it, perhaps before it is known what computed it. When a
    module has run, or is about to, its tensors are looked at: by their autograd nodes a formula may compute them.
    """

    def __init__(self, frame: FrameType, outer_hooks: Any) -> None:
        self.frame: FrameType | None = frame
        self.outer_hooks = outer_hooks
        self.boxes: dict[Key, ReferenceType[Box]] = {}
        self.formulas: dict[Key, tuple[Formula, StorageWeakRef]] = {}  # of maps that nobody has saved yet
        self.seen: dict[tuple[Any, int], Seen] = {}  # by node and output
        self.found: dict[Any, Formula | None] = {}  # formulas by node
        self.hooks: Any = torch.autograd.graph.saved_tensors_hooks(self.pack, unpack)

    def is_running(self) -> bool:
        """Whether the call of the outermost module goes on: an interrupt ends it without its hooks."""
        try:
            if self.frame is not None:
                self.frame.clear()
        except RuntimeError:  # "cannot clear an executing frame"
            return True
        return False

    def pack(self, tensor: Tensor) -> Box:
        """Return what autograd keeps in place of ``tensor``."""
        is_map = tensor.dim() > 1 and type(tensor) is not nn.Parameter
        key = key_of(tensor) if is_map else None
        box = None if key is None else self._box(key)
        if box is None:
            box = Box(tensor)
            if key is not None and key in self.formulas:
                box.compute_later(self.formulas[key][0])
            if key is not None or self.outer_hooks:
                self.boxes[(id(box),) if key is None else key] = ref(box)
        box.add_use()
        return box

    def _box(self, key: Key) -> Box | None:
        reference = self.boxes.get(key)
        return None if reference is None else reference()

    def read_layer(self, layer: nn.Module, output: Any) -> None:
        """Learn how a normalization layer that has just run computed its output."""
        if not isinstance(layer, _BatchNorm) or type(output) not in PLAIN:
            return
        node = normalization.node_under(output.grad_fn)
        if node is not None and node not in self.found:
            self.found[node] = normalization.read(node, layer)
            self.seen.pop((output.grad_fn, output.output_nr), None)  # by an activation within the layer: too early
            self._read_activation(output.grad_fn)

    def read_activation(self, layer: nn.Module, output: Any) -> None:
        """Save less for an activation that has just run, if it saves a map that can be computed again."""
        if isinstance(layer, SAVES_INPUT) and type(output) in PLAIN and normalization.is_known(layer):
            self._read_activation(output.grad_fn)

    def _read_activation(self, node: Any) -> None:
        name = type(node).__name__
        if name not in ACTIVATIONS or not hasattr(type(node), "_saved_self"):
            return
        formula = self._formula(node.next_functions[0][0])
        if formula is None or formula.depth > _MAX_DEPTH:
            return
        for box in peek(lambda: node._saved_self):
            if box.formula is None and not box.is_changed and _computes(formula, box.get()):
                box.compute_later(formula)
            if box.formula is not None:  # computed once for both
                self.found[node] = Activated(ACTIVATIONS[name](node), Kept(box))

    def look_at(self, tensors: Any) -> None:
        """Look whether tensors that go into a module, or come out of it, can be computed again."""
        tensors = tuple(tensors.values()) if isinstance(tensors, dict) else tensors
        for tensor in tensors if isinstance(tensors, tuple | list) else (tensors,):
            if type(tensor) not in PLAIN or tensor.grad_fn is None:
                continue
            node, output = tensor.grad_fn, (tensor.grad_fn, tensor.output_nr)
            if output in self.seen:
                address, changes, *_ = self.seen[output].key
                if tensor._version != changes or tensor.untyped_storage()._cdata != address:
                    self.found[node] = None  # changed, and autograd did not see it
                continue
            key = key_of(tensor)
            if key is not None:
                formula = self._formula(node)
                storage, version = weak_reference(tensor), None if formula is None else version_of(tensor)
                self.seen[output] = Seen(key, storage, version)
                if formula is not None and formula.depth <= _MAX_DEPTH:
                    self._save_less(tensor, key, formula)

    def _save_less(self, tensor: Tensor, key: Key, formula: Formula) -> None:
        if not self._is_intact(tensor.grad_fn, key[0]):
            self.found[tensor.grad_fn] = None
        elif _computes(formula, tensor):
            self.formulas[key] = formula, weak_reference(tensor)
            box = self._box(key)
            if box is not None:
                box.compute_later(formula)

    def _formula(self, node: Any, levels: int = _MAX_LEVELS) -> Formula | None:
        """Return the formula of a node's output, None if there is none (yet: a layer that activates ends later)."""
        if node is None or levels == 0:
            return None
        if node in self.found:
            return self.found[node]
        name = type(node).__name__
        formula: Formula | None = None
        if name in ACTIVATIONS:
            inner = self._formula(node.next_functions[0][0], levels - 1)
            formula = None if inner is None else Activated(ACTIVATIONS[name](node), inner)
        elif name == "AddBackward0" and node._saved_alpha == 1 and len(node.next_functions) == 2:
            formula = self._sum(node.next_functions, levels - 1)
        if formula is not None:
            self.found[node] = formula
        return formula

    def _is_intact(self, node: Any, storage: Any, steps: int = 0) -> bool:
        """Whether only recorded operators wrote to what a tensor in ``storage`` was computed from in ``steps``."""
        seen = self.seen.get((node, 0)) if steps else None
        if seen is not None and seen.version is not None:
            changes: int = seen.version._version - seen.key[1]
            # all steps were in place, or the last one was not
            return changes == steps if bool(seen.key[0] == storage) else changes < steps
        is_part = type(node).__name__ in (*ACTIVATIONS, "AddBackward0") and steps < _MAX_LEVELS
        edges = node.next_functions if is_part else ()
        return all(self._is_intact(edge, storage, steps + 1) for edge, _ in edges if edge is not None)

    def _sum(self, edges: tuple[tuple[Any, int], ...], levels: int) -> Sum | None:
        """Return the formula of a residual sum: of two normalized maps, or of one and a map that is kept."""
        for (node, _), other in (edges, edges[::-1]):
            new = self._formula(node, levels)
            added = None if new is None else self._kept(*other) or self._formula(other[0], levels)
            if new is not None and added is not None and added.layout == new.layout:
                return Sum(new, added)
        return None

    def _kept(self, node: Any, output_nr: int) -> Kept | None:
        """Return a node's output, if it was seen and the graph keeps it."""
        seen = self.seen.get((node, output_nr))
        box = None if seen is None else self._box(seen.key)
        return None if box is None or box.is_changed else Kept(box)

    def close(self) -> None:
        """Forget all but the boxes, which the graph has; what is still kept goes to the hooks around this pass."""
        for reference in self.boxes.values() if self.outer_hooks else ():
            box = reference()
            if box is not None:
                box.hand_over(*self.outer_hooks)
        for table in (self.boxes, self.formulas, self.seen, self.found):
            table.clear()
        self.frame = self.hooks = self.outer_hooks = None  # no cycle


def _computes(formula: Formula, tensor: Tensor) -> bool:
    """Whether a formula gives a tensor to the bit: tried once per kind of formula."""
    if formula.layout != layout_of(tensor):
        return False
    if formula.kind in _equal:
        return _equal[formula.kind]
    with torch.no_grad():
        if not normalization.tells(tensor):
            return False
        try:
            computed = formula.compute()
        except RuntimeError:  # an input was changed in place
            return False
        _equal[formula.kind] = normalization.have_equal_bits(computed, tensor)
    return _equal[formula.kind]
