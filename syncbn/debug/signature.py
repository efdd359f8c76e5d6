"""What a rank is about to exchange, in a row of fixed size, and how rows of several ranks are compared and shown."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

SIZE = 256  # bytes of a row
_SEPARATOR = "\x1f"
_MANY = 20  # kinds of rows that a message lists


class Signature(NamedTuple):
    """One exchange as its rank sees it; a field is empty where it does not apply."""

    direction: str
    channels: str
    dtype: str
    gradient: str  # of the input: whether there will be an exchange backward
    numbers: str
    settings: str  # eps, momentum
    name: str  # of the layer

    def pack(self) -> bytes:
        """Write the row; of a name that does not fit, the front is left out."""
        head = _SEPARATOR.join(field[:32] for field in self[:-1]).encode() + _SEPARATOR.encode()
        name = self.name.encode()[-(SIZE - len(head)) :].decode(errors="ignore")
        return (head + name.encode()).ljust(SIZE, b"\0")

    def __str__(self) -> str:
        channels = f"{self.channels} channels" if self.channels else ""
        facts = [self.name, self.direction, channels, self.dtype, self.gradient, f"{self.numbers} numbers"]
        return ", ".join(fact for fact in facts if fact)

    def beside(self, others: "list[Signature]") -> str:
        """Say what it is, with the settings where they are not those of the others."""
        return str(self) if len({other.settings for other in others}) == 1 else f"{self}, {self.settings}"


def unpack(row: bytes) -> Signature:
    """Read a row."""
    return Signature(*row.rstrip(b"\0").decode().split(_SEPARATOR))


def differences(signatures: list[Signature]) -> list[str]:
    """Name the fields in which not all are the same."""
    longest = max((s.name for s in signatures), key=len)
    names = ["direction", "channels", "dtype", "gradient of the input", "numbers", "settings"]
    found = [name for i, name in enumerate(names) if len({s[i] for s in signatures}) > 1]
    return found if all(is_same(s.name, longest) for s in signatures) else ["layer", *found]


def is_same(one: str, other: str) -> bool:
    """Whether two names can be of one layer: one rank may have no name for it, or that of a larger model's part."""
    if sum(name.startswith("SyncBatchNorm(") for name in (one, other)) == 1 and (" (" in one or " (" in other):
        return True
    (path, _, root), (path2, _, root2) = one.partition(" ("), other.partition(" (")
    if path == path2 or root == root2:
        return one == other
    return f".{path}".endswith(f".{path2}") or f".{path2}".endswith(f".{path}")


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
