"""A folder of image files: found by name, decoded one at a time, within limits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_BYTES, MAX_PIXELS = 2**26, 2**26  # of one file: a small one may unpack to more than the memory
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")  # those of ImageFolder, whatever a file is called


class ImageFiles(Sequence[Tensor]):
    """Read the images of one `ImageFolder`, one at a time, as `(3, H, W)` uint8."""

    def __init__(self, root: Path) -> None:
        from torchvision.datasets import ImageFolder

        self.folder = ImageFolder(str(root), loader=decode)
        self.classes: list[str] = self.folder.classes
        self.labels = torch.tensor(self.folder.targets)

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: Any) -> Any:
        from PIL import Image
        from torchvision.transforms.v2.functional import pil_to_tensor

        try:
            return pil_to_tensor(self.folder[index][0])
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"cannot read {self.folder.samples[index][0]}: {error}") from error


def decode(path: str) -> Any:
    """Decode an image file, within limits: whoever made it may not be the user.

    Raises:
        ValueError: If the file, or the image that it announces, is too large.
        OSError: If it is no image of `FORMATS`, or is truncated.
    """
    from PIL import Image

    num_bytes = Path(path).stat().st_size
    if num_bytes > MAX_BYTES:
        raise ValueError(f"expected an image file of at most {MAX_BYTES} bytes, got {num_bytes}; scale it down")
    with Image.open(path, formats=FORMATS) as image:  # reads the header alone
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(
                f"expected an image of at most {MAX_PIXELS} pixels, got {image.width} x {image.height}; scale it down"
            )
        return image.convert("RGB")
