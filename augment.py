"""Batched image augmentation with independent random parameters for every image.

Everything runs on the device of `x`, draws from an explicit `torch.Generator` on that device, and agrees with torchvision's
functional transforms image by image. (torchvision's own random transforms, applied to a batch, draw one set of parameters
for all of it.) Each random transform is a thin layer that draws parameters for a deterministic one: `random_resized_crop`
over `resized_crop`, `color_jitter` over `adjust_brightness`, `adjust_contrast`, `adjust_saturation` and `adjust_hue`.

    view1, view2 = two_views(images)      # uint8 or float [B,3,H,W] -> two float [B,3,H,W] in 0..1, the views of SimCLR
    view = weak(images)                   # a shifted and perhaps flipped copy

Source: Chen et al. 2020, "A Simple Framework for Contrastive Learning" (arXiv 2002.05709), appendix A, without the blur.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

GREY = (0.2989, 0.587, 0.114)  # luma weights of ITU-R BT.601, as torchvision uses them


def to_float(x: Tensor) -> Tensor:
    """Images uint8 in 0..255 or float in 0..1 -> float32 in 0..1."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x.float()


def uniform(x: Tensor, low: float, high: float, generator: torch.Generator | None) -> Tensor:
    """One number in low..high for every image of x: float32 [B]."""
    return torch.rand(len(x), device=x.device, generator=generator) * (high - low) + low


def chance(x: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
    """True with probability p, independently for every image of x: bool [B]."""
    return torch.rand(len(x), device=x.device, generator=generator) < p


# ---- geometry -------------------------------------------------------------------------------------------------------


def interpolation(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Matrices that stretch `length` pixels from `start` on to `size` pixels, linearly: [B], [B] -> [B, size, size].

    Row i holds the weights of the input pixels in output pixel i, whose centre lies at (i + 1/2) length / size - 1/2.
    """
    pixel = torch.arange(size, device=start.device, dtype=torch.float32)
    centre = (pixel + 0.5) * (length / size)[:, None] - 0.5  # (B, size), relative to start
    centre = centre.clamp(min=0).minimum(length[:, None] - 1) + start[:, None]
    return (centre[:, :, None] - pixel).abs_().neg_().add_(1).clamp_(min=0)


def resized_crop(x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Crop every image to its own box and stretch it back to full size, bilinearly.

    x: float [B,C,H,W]; top, left, height, width: [B], in whole pixels, inside the image. Two small matrix products do
    the work: rows @ image @ columns.
    """
    b, c, h, w = x.shape
    columns = interpolation(left.float(), width.float(), w)
    rows = interpolation(top.float(), height.float(), h)
    x = torch.bmm(x.reshape(b, c * h, w), columns.transpose(1, 2)).view(b, c, h, w)
    return rows[:, None] @ x


def random_resized_crop(
    x: Tensor,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    generator: torch.Generator | None = None,
    tries: int = 10,
) -> Tensor:
    """A box of random area and aspect, stretched to full size, for every image. float [B,3,H,W] in 0..1 -> the same.

    scale: range of the area as a fraction of the image; ratio: range of width / height, drawn log-uniformly.
    As in torchvision, the first of ten draws that fits is taken, and the largest centred box if none does.
    """
    b, _, h, w = x.shape
    draw = torch.rand(4, tries, b, device=x.device, generator=generator)
    area = h * w * (scale[0] + (scale[1] - scale[0]) * draw[0])
    aspect = torch.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * draw[1])
    width, height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()  # (tries, B)
    fits = (width >= 1) & (width <= w) & (height >= 1) & (height <= h)
    first = fits.int().argmax(0, keepdim=True)
    width, height = width.gather(0, first)[0], height.gather(0, first)[0]
    fallback = ~fits.any(0)
    width = torch.where(fallback, min(w, round(h * ratio[1])), width)
    height = torch.where(fallback, min(h, round(w / ratio[0])), height)
    top = torch.where(fallback, (h - height) / 2, draw[2, 0] * (h - height + 1)).floor()
    left = torch.where(fallback, (w - width) / 2, draw[3, 0] * (w - width + 1)).floor()
    return resized_crop(x, top, left, height, width)


def horizontal_flip(x: Tensor, p: float = 0.5, generator: torch.Generator | None = None) -> Tensor:
    """Mirror each image left to right with probability p. float [B,3,H,W] -> the same."""
    return torch.where(chance(x, p, generator)[:, None, None, None], x.flip(3), x)


def pad_crop(x: Tensor, padding: int = 4, generator: torch.Generator | None = None) -> Tensor:
    """Pad with zeros on all sides and cut the original size out at a random place. float [B,3,H,W] -> the same."""
    b, _, h, w = x.shape
    shift = torch.randint(0, 2 * padding + 1, (2, b, 1), device=x.device, generator=generator)
    rows = (shift[0] + torch.arange(h, device=x.device))[:, :, None]  # (B, H, 1)
    columns = (shift[1] + torch.arange(w, device=x.device))[:, None, :]  # (B, 1, W)
    image = torch.arange(b, device=x.device)[:, None, None]
    padded = F.pad(x, (padding,) * 4).permute(0, 2, 3, 1)  # (B, H + 2p, W + 2p, C)
    return padded[image, rows, columns].permute(0, 3, 1, 2)


# ---- colour ---------------------------------------------------------------------------------------------------------


def grayscale(x: Tensor) -> Tensor:
    """Luma of RGB images: float [B,3,H,W] -> [B,1,H,W]."""
    r, g, b = x.unbind(1)
    return (r * GREY[0]).add_(g, alpha=GREY[1]).add_(b, alpha=GREY[2])[:, None]


def blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor x + (1 - factor) other, clipped to 0..1; factor [B], one for every image."""
    return torch.lerp(other, x, factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply each image by its factor [B] and clip."""
    return (x * factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with the mean of its luma by factor [B]."""
    return blend(x, grayscale(x).mean((2, 3), keepdim=True), factor)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with its luma by factor [B]."""
    return blend(x, grayscale(x), factor)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue of each image by shift [B] turns (-0.5..0.5), with value and saturation kept: the rotation in HSV.

    With v = max, c = max - min and the hue h counted in sixths of a turn, the way back from HSV needs no case
    distinction: channel = v - c clip(2 - |(h + n) mod 6 - 2|, 0, 1), where n = 5, 3, 1 for red, green, blue.
    """
    r, g, b = x.unbind(1)
    v = x.amax(1)
    c = v - x.amin(1)  # (B, H, W)
    two_c = c * 2
    h = torch.where(v == r, g - b, torch.where(v == g, (b - r).add_(two_c), (r - g).add_(two_c).add_(two_c)))
    h = h.div_(c.clamp(min=1e-9)).add_(6 * shift[:, None, None])
    out = torch.empty_like(x)
    for channel, n in enumerate((5, 3, 1)):
        k = h + n
        k.sub_((k * (1 / 6)).floor_(), alpha=6)
        k.sub_(2).abs_().neg_().add_(2).clamp_(0, 1)
        torch.addcmul(v, k, c, value=-1, out=out[:, channel])
    return out


def color_jitter(
    x: Tensor,
    brightness: float | tuple[float, float] = 0.4,
    contrast: float | tuple[float, float] = 0.4,
    saturation: float | tuple[float, float] = 0.4,
    hue: float | tuple[float, float] = 0.1,
    p: float = 0.8,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Brightness, contrast, saturation, hue, in this order, each with its own factor for every image.

    x: float [B,3,H,W] in 0..1. A strength s means a factor in 1-s..1+s (a hue shift in -s..s turns); a pair is the range
    itself. An image is left alone with probability 1 - p.
    """
    applied = chance(x, p, generator)
    for adjust, strength, neutral in (
        (adjust_brightness, brightness, 1.0),
        (adjust_contrast, contrast, 1.0),
        (adjust_saturation, saturation, 1.0),
        (adjust_hue, hue, 0.0),
    ):
        low, high = strength if isinstance(strength, tuple | list) else (neutral - strength, neutral + strength)
        if neutral == 1.0:
            low = max(low, 0.0)
        if (low, high) != (neutral, neutral):
            x = adjust(x, torch.where(applied, uniform(x, low, high, generator), neutral))
    return x


def random_grayscale(x: Tensor, p: float = 0.2, generator: torch.Generator | None = None) -> Tensor:
    """Replace each image by its luma, in three equal channels, with probability p. float [B,3,H,W] -> the same."""
    return torch.where(chance(x, p, generator)[:, None, None, None], grayscale(x), x)


# ---- views ----------------------------------------------------------------------------------------------------------


def strong(
    x: Tensor,
    scale: tuple[float, float] = (0.2, 1.0),
    flip: bool = True,
    color: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One strong view: crop, then flip and colour where the images allow it. uint8 or float [B,3,H,W] -> float in 0..1."""
    x = random_resized_crop(to_float(x), scale, generator=generator)
    if flip:
        x = horizontal_flip(x, generator=generator)
    if color:
        x = random_grayscale(color_jitter(x, generator=generator), generator=generator)
    return x


def two_views(
    x: Tensor,
    scale: tuple[float, float] = (0.2, 1.0),
    flip: bool = True,
    color: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Two independent strong views of every image, the positive pair of NT-Xent. See `strong`."""
    return strong(x, scale, flip, color, generator), strong(x, scale, flip, color, generator)


def weak(x: Tensor, flip: bool = True, padding: int = 4, generator: torch.Generator | None = None) -> Tensor:
    """One weak view: shifted by up to `padding` pixels and perhaps mirrored. uint8 or float [B,3,H,W] -> float in 0..1."""
    x = pad_crop(to_float(x), padding, generator)
    return horizontal_flip(x, generator=generator) if flip else x
