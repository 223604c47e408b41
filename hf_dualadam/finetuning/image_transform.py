"""Convert images to the pixel values of a model, with Pillow only."""

import math
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image as PILImage
from transformers import PretrainedConfig


def eight_bits(image: PILImage.Image) -> PILImage.Image:
    """Convert an image to 8 bits per channel; 16-bit gray is scaled, where Pillow's conversion clips it at 255.

    Raises:
        ValueError: its values are 32-bit numbers, whose range is unknown.
    """
    if image.mode.startswith("I;16"):
        return PILImage.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "whole numbers" if image.mode == "I" else "fractions"
        raise ValueError(f"its pixels are {kind} of 32 bits, of unknown range; save it with 8 or 16 bits")
    return image


class ImageTransform:
    """Image -> pixel values (channels, height, width), with Pillow only.

    Images are resized and normalized as by the model's image processor. For training, either a random crop of at least
    ``crop_min_scale`` of the area, with an aspect ratio of at most 4:3, is resized; or the resized image is padded by
    ``crop_padding`` black pixels and cropped at random. Random numbers come from torch, whose state Trainer
    seeds, saves and restores.

    Args:
        processor: the model's image processor.
        config: the model's configuration: images of one channel are gray, of three channels RGB.
        crop_min_scale: smallest fraction of the area; 1 for no crop.
        crop_padding: in pixels of the resized image; 0 for none. Replaces ``crop_min_scale``.
        horizontal_flip: mirror an image with probability 1/2.
    """

    def __init__(
        self,
        processor: Any,
        config: PretrainedConfig,
        crop_min_scale: float = 1.0,
        crop_padding: int = 0,
        horizontal_flip: bool = False,
    ):
        size = dict(processor.size)
        self.shortest_edge = size.get("shortest_edge")
        crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
        target = dict(crop) if crop else size
        side = self.shortest_edge
        self.height, self.width = target.get("height") or side, target.get("width") or side
        self.mode = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"
        self.resample = PILImage.Resampling(processor.resample)
        normalize = processor.do_normalize
        self.mean = np.asarray(processor.image_mean if normalize else 0.0, dtype=np.float32)
        self.std = np.asarray(processor.image_std if normalize else 1.0, dtype=np.float32)
        self.crop_min_scale, self.crop_padding = 1.0 if crop_padding else crop_min_scale, crop_padding
        self.horizontal_flip = horizontal_flip

    def __call__(self, image: PILImage.Image) -> torch.Tensor:
        """Transform one image."""
        image = eight_bits(image).convert(self.mode)
        box = self._random_box(image) if self.crop_min_scale < 1 else self._center_box(image)
        image = image.resize((self.width, self.height), self.resample, box=box)
        if self.crop_padding:
            left, top = torch.randint(-self.crop_padding, self.crop_padding + 1, (2,)).tolist()
            image = image.crop((left, top, left + self.width, top + self.height))
        if self.horizontal_flip and torch.rand(()) < 0.5:
            image = image.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.asarray(image, dtype=np.float32).reshape(self.height, self.width, -1) / 255
        return torch.from_numpy(((pixels - self.mean) / self.std).transpose(2, 0, 1).copy())

    def _center_box(self, image: PILImage.Image) -> tuple[float, float, float, float]:
        """The whole image, or its center where the processor resizes the shortest edge and crops."""
        if self.shortest_edge is None:
            return 0, 0, image.width, image.height
        scale = min(image.size) / self.shortest_edge
        width, height = min(self.width * scale, image.width), min(self.height * scale, image.height)
        left, top = (image.width - width) / 2, (image.height - height) / 2
        return left, top, left + width, top + height

    def _random_box(self, image: PILImage.Image) -> tuple[float, float, float, float]:
        share, shape, x, y = torch.rand(4).tolist()
        area = image.width * image.height * (self.crop_min_scale + (1 - self.crop_min_scale) * share)
        ratio = math.exp((2 * shape - 1) * math.log(4 / 3))
        width, height = min(math.sqrt(area * ratio), image.width), min(math.sqrt(area / ratio), image.height)
        left, top = x * (image.width - width), y * (image.height - height)
        return left, top, left + width, top + height


class ImageView(torch.utils.data.Dataset):
    """An image dataset as Trainer reads it: pixel values and labels, transformed on access."""

    def __init__(self, dataset: Dataset, transform: ImageTransform):
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        """Number of images."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Decode and transform one image."""
        row = self.dataset[index]
        labels = {"labels": row["label"]} if "label" in row else {}
        return {"pixel_values": self.transform(row["image"])} | labels
