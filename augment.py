"""Batched image augmentation with independent random parameters for every image.

Images are uint8 in 0..255 or floating point in 0..1, [B,C,H,W] with C = 3 or 1; results are float32 in 0..1.
All run on the device of the images, draw from a generator on it, pass gradients, and agree with torchvision's
functional transforms image by image. (Its random transforms draw one set of parameters for a whole batch.)
Wrong shapes, dtypes, p, scales raise ValueError.

    view1, view2 = two_views(images)      # the two strong views of SimCLR
    view = weak(images)                   # a shifted and perhaps mirrored copy

Source: Chen et al. 2020, SimCLR (arXiv 2002.05709), appendix A, without its blur.
"""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Range = tuple[float, float]


def to_float(x: Tensor) -> Tensor:
    """Images [B,C,H,W], uint8 in 0..255 or floating point in 0..1 -> float32 in 0..1."""
    if x.ndim != 4 or x.shape[1] not in (1, 3) or 0 in x.shape[2:]:
        raise ValueError(f"images must be [B,3,H,W] or [B,1,H,W], not {list(x.shape)}")
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise ValueError(f"images must be uint8 or floating point, not {x.dtype}")
    return x.float().div_(255) if x.dtype == torch.uint8 else x.float()


def per_image(x: Tensor, value: Tensor, name: str) -> Tensor:
    """A value for every image of x: [B] -> float32 [B,1,1,1]."""
    if value.shape != x.shape[:1]:
        raise ValueError(f"{name} must have the shape [{len(x)}], not {list(value.shape)}")
    return value.float().view(-1, 1, 1, 1)


def uniform(x: Tensor, low: float, high: float, generator: Generator | None) -> Tensor:
    """A number in low..high for every image of x: float32 [B]."""
    return torch.rand(len(x), device=x.device, generator=generator) * (high - low) + low


def chance(x: Tensor, p: float, generator: Generator | None) -> Tensor:
    """True with probability p for every image of x: bool [B]."""
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in 0..1, not {p}")
    return torch.rand(len(x), device=x.device, generator=generator) < p


# ---- geometry ----


def interpolation(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Matrices that stretch `length` pixels from `start` on to `size`, linearly: [B], [B] -> [B,size,size].

    Row i weighs the input pixels of output pixel i, whose centre is at (i + 1/2) length / size - 1/2.
    """
    pixel = torch.arange(size, device=start.device, dtype=torch.float32)
    centre = (pixel + 0.5) * (length / size)[:, None] - 0.5  # (B, size), relative to start
    centre = centre.clamp(min=0).minimum(length[:, None] - 1) + start[:, None]
    return (centre[:, :, None] - pixel).abs_().neg_().add_(1).clamp_(min=0)


def resized_crop(x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Crop every image to its own box and stretch it back to full size, bilinearly.

    top, left, height, width: [B], in whole pixels, inside the image. Two small matrix products do the work:
    rows @ image @ columns.
    """
    x = to_float(x)
    b, c, h, w = x.shape
    for side in (top, left, height, width):
        per_image(x, side, "box")  # checks the shape
    columns = interpolation(left.float(), width.float(), w)  # (B, W, W)
    rows = interpolation(top.float(), height.float(), h)  # (B, H, H)
    with torch.autocast(x.device.type, enabled=False):  # which would compute in bfloat16
        x = torch.bmm(x.reshape(b, c * h, w), columns.transpose(1, 2)).view(b, c, h, w)
        return rows[:, None] @ x


def random_resized_crop(
    x: Tensor, scale: Range = (0.2, 1.0), ratio: Range = (3 / 4, 4 / 3), generator: Generator | None = None
) -> Tensor:
    """Stretch a box of random area and aspect to full size, for every image.

    scale: range of the area, as a share; ratio: range of width / height, drawn log-uniformly. As in
    torchvision, the first of ten draws that fits is taken, or else the largest centred box.
    """
    x = to_float(x)
    for name, (low, high) in {"scale": scale, "ratio": ratio}.items():
        if not 0 < low <= high:
            raise ValueError(f"{name} must be a range above 0, not {low}..{high}")
    b, _, h, w = x.shape
    draw = torch.rand(4, 10, b, device=x.device, generator=generator)
    area = h * w * (scale[0] + (scale[1] - scale[0]) * draw[0])
    aspect = torch.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * draw[1])
    width, height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()  # (10, B)
    fits = (width >= 1) & (width <= w) & (height >= 1) & (height <= h)
    first = fits.int().argmax(0, keepdim=True)
    width, height = width.gather(0, first)[0], height.gather(0, first)[0]
    fallback = ~fits.any(0)
    width = torch.where(fallback, max(1, min(w, round(h * ratio[1]))), width)
    height = torch.where(fallback, max(1, min(h, round(w / ratio[0]))), height)
    top = torch.where(fallback, (h - height) / 2, draw[2, 0] * (h - height + 1)).floor()
    left = torch.where(fallback, (w - width) / 2, draw[3, 0] * (w - width + 1)).floor()
    return resized_crop(x, top, left, height, width)


def horizontal_flip(x: Tensor, p: float = 0.5, generator: Generator | None = None) -> Tensor:
    """Mirror each image left to right with probability p."""
    x = to_float(x)
    return torch.where(chance(x, p, generator)[:, None, None, None], x.flip(3), x)


def pad_crop(x: Tensor, padding: int = 4, generator: Generator | None = None) -> Tensor:
    """Pad with `padding` zeros on all sides and cut the original size out at a random place."""
    x = to_float(x)
    if padding < 0:
        raise ValueError(f"padding must be 0 or more, not {padding}")
    b, _, h, w = x.shape
    shift = torch.randint(0, 2 * padding + 1, (2, b, 1), device=x.device, generator=generator)
    rows = (shift[0] + torch.arange(h, device=x.device))[:, :, None]  # (B, H, 1)
    columns = (shift[1] + torch.arange(w, device=x.device))[:, None, :]  # (B, 1, W)
    image = torch.arange(b, device=x.device)[:, None, None]
    padded = F.pad(x, (padding,) * 4).permute(0, 2, 3, 1)  # (B, H + 2p, W + 2p, C)
    return padded[image, rows, columns].permute(0, 3, 1, 2)


# ---- colour ----


def grayscale(x: Tensor) -> Tensor:
    """Luma: [B,3,H,W] -> [B,1,H,W]; one channel is its own luma."""
    x = to_float(x)
    if x.shape[1] == 1:
        return x
    r, g, b = x.unbind(1)
    return (r * 0.2989).add_(g, alpha=0.587).add_(b, alpha=0.114)[:, None]  # ITU-R BT.601, as torchvision


def blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor x + (1 - factor) other, clipped to 0..1; factor [B], one for every image."""
    return torch.lerp(other, to_float(x), per_image(x, factor, "factor")).clamp_(0, 1)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply each image by its factor [B] and clip."""
    x = to_float(x)
    return (x * per_image(x, factor, "factor")).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with the mean of its luma by factor [B]."""
    return blend(x, grayscale(x).mean((2, 3), keepdim=True), factor)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with its luma by factor [B]."""
    return blend(x, grayscale(x), factor)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue of each image by shift [B] turns (-0.5..0.5) in HSV, keeping value and saturation.

    With v = max, c = max - min and the hue h in sixths of a turn, the way back from HSV needs no cases:
    channel = v - c clip(2 - |(h + n) mod 6 - 2|, 0, 1), where n = 5, 3, 1 for red, green, blue.
    """
    x = to_float(x)
    turns = 6 * per_image(x, shift, "shift")[:, 0]  # (B, 1, 1)
    if x.shape[1] == 1:
        return x
    r, g, b = x.unbind(1)
    v = x.amax(1)
    c = v - x.amin(1)  # (B, H, W)
    two_c = c * 2
    h = torch.where(v == r, g - b, torch.where(v == g, (b - r).add_(two_c), (r - g).add_(two_c).add_(two_c)))
    h = h.div_(c.clamp(min=1e-9)).add_(turns)
    channels = []
    for n in (5, 3, 1):
        k = h + n
        k.sub_((k * (1 / 6)).floor_(), alpha=6)
        channels.append(torch.addcmul(v, k.sub_(2).abs_().neg_().add_(2).clamp_(0, 1), c, value=-1))
    return torch.stack(channels, 1)


def color_jitter(
    x: Tensor,
    brightness: float | Range = 0.4,
    contrast: float | Range = 0.4,
    saturation: float | Range = 0.4,
    hue: float | Range = 0.1,
    p: float = 0.8,
    generator: Generator | None = None,
) -> Tensor:
    """Brightness, contrast, saturation and hue, in this order, each with its own factor for every image.

    A strength s means a factor in 1-s..1+s (a shift in -s..s turns for the hue); a pair is the range itself.
    An image is left alone with probability 1 - p.
    """
    x = to_float(x)
    applied = chance(x, p, generator)
    for adjust, strength, neutral in (
        (adjust_brightness, brightness, 1.0),
        (adjust_contrast, contrast, 1.0),
        (adjust_saturation, saturation, 1.0),
        (adjust_hue, hue, 0.0),
    ):
        pair = isinstance(strength, tuple | list)
        low, high = strength if pair else (neutral - strength, neutral + strength)
        low = max(low, 2 * neutral - 2)  # factors are not negative
        if not low <= high:
            raise ValueError(f"{adjust.__name__} needs a strength or a range, not {strength}")
        if (low, high) != (neutral, neutral):
            x = adjust(x, torch.where(applied, uniform(x, low, high, generator), neutral))
    return x


def random_grayscale(x: Tensor, p: float = 0.2, generator: Generator | None = None) -> Tensor:
    """Replace each image by its luma, in equal channels, with probability p."""
    return torch.where(chance(x, p, generator)[:, None, None, None], grayscale(x), to_float(x))


# ---- views ----


def strong(
    x: Tensor,
    scale: Range = (0.2, 1.0),
    flip: bool = True,
    color: bool = True,
    generator: Generator | None = None,
) -> Tensor:
    """One strong view: a random crop, a random flip if `flip`, random colours if `color`."""
    x = random_resized_crop(x, scale, generator=generator)
    if flip:
        x = horizontal_flip(x, generator=generator)
    if color:
        x = random_grayscale(color_jitter(x, generator=generator), generator=generator)
    return x


def two_views(x: Tensor, *args, **options) -> tuple[Tensor, Tensor]:
    """Two independent strong views of every image, the positive pair of NT-Xent. Arguments: see `strong`."""
    return strong(x, *args, **options), strong(x, *args, **options)


def weak(x: Tensor, flip: bool = True, padding: int = 4, generator: Generator | None = None) -> Tensor:
    """One weak view: shifted by up to `padding` pixels and, if `flip`, perhaps mirrored."""
    x = pad_crop(x, padding, generator)
    return horizontal_flip(x, generator=generator) if flip else x
