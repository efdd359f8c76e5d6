"""What a rank is about to exchange, in a row of fixed size, and how rows of several ranks are compared and told."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from .names import is_another_of_the_name, is_same, names_here

SIZE = 256  # bytes of a row
_SEPARATOR = "\x1f"
_MANY = 20  # kinds of rows that a message lists


class Signature(NamedTuple):
    """One exchange as its rank sees it; several layers may share it."""

    direction: str
    channels: str
    dtype: str
    gradient: str  # of the input: whether there will be an exchange backward
    numbers: str
    settings: str  # of the layers: eps, momentum
    made: str  # when the layers were, in numbers
    num_layers: str
    layers: tuple[str, ...]  # as many as fit into a row

    def pack(self) -> bytes:
        """Write the row; layers that do not fit are left out, of a single one the front."""
        head = _SEPARATOR.join(field[:32] for field in self[:-1])
        layers, room = list(self.layers), SIZE - len(head.encode()) - 1
        while len(layers) > 1 and len(_SEPARATOR.join(layers).encode()) > room:
            layers.pop()
        names = _SEPARATOR.join(layers).encode()[-room:].decode(errors="ignore")
        return f"{head}{_SEPARATOR}{names}".encode().ljust(SIZE, b"\0")

    def __str__(self) -> str:
        more = int(self.num_layers) - len(self.layers)
        layers = ", ".join(self.layers) + (f" and {more} more" if more else "")
        channels = f"{self.channels} channels" if self.channels else ""
        words = [layers, self.direction, channels, self.dtype, self.gradient, f"{self.numbers} numbers"]
        return ", ".join(word for word in words if word)

    def told_to(self, others: "list[Signature]") -> str:
        """Say what it is, with the settings where they are not those of the others."""
        return str(self) if len({other.settings for other in others}) == 1 else f"{self}, {self.settings}"


def unpack(row: bytes) -> Signature:
    """Read a row."""
    fields = row.rstrip(b"\0").decode().split(_SEPARATOR)
    direction, channels, dtype, gradient, numbers, settings, made, num_layers, *layers = fields
    return Signature(direction, channels, dtype, gradient, numbers, settings, made, num_layers, tuple(layers))


def listed(words: Iterable[object]) -> str:
    """Join what several layers have, once if all have the same."""
    texts = [str(word) for word in words]
    return "+".join(texts) if len(set(texts)) > 1 else "".join(texts[:1])


def differences(signatures: list[Signature]) -> list[str]:
    """Name the fields in which not all are the same."""
    reference = max(signatures, key=lambda s: len("".join(s.layers)))
    names = ["direction", "channels", "dtype", "gradient of the input", "numbers", "settings"]
    found = [name for i, name in enumerate(names) if len({s[i] for s in signatures}) > 1]
    here = names_here(*(name for s in signatures for name in s.layers))
    if not all(_are_same(s, reference, here) for s in signatures):
        found.insert(0, "layer")
    return found


def _are_same(one: Signature, other: Signature, here: set[str]) -> bool:
    """Compare the layers: models of the same names by their order too, which only a rank that has several knows."""
    pairs = [*zip(one.layers, other.layers, strict=False)]
    if one.num_layers != other.num_layers or not all(is_same(a, b, here) for a, b in pairs):
        return False
    return one.made == other.made or not any(is_another_of_the_name(a, b) for a, b in pairs)


def table(texts: Mapping[int, str]) -> str:
    """Write one line for all ranks that have the same text."""
    ranks_of: dict[str, list[int]] = {}
    for rank, text in sorted(texts.items()):
        ranks_of.setdefault(text, []).append(rank)
    lines = [f"  {ranks(of)}: {text}" for text, of in ranks_of.items()]
    return "\n".join(lines[:_MANY] + [f"  and {len(lines) - _MANY} more"] * (len(lines) > _MANY))


def ranks(numbers: Iterable[int]) -> str:
    """Write "rank 3", "ranks 0-2, 5"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank {text}" if len(spans) == 1 and spans[0][0] == spans[0][1] else f"ranks {text}"
