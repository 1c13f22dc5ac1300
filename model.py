"""The network: an encoder, a projector for the self-supervised losses, and a head that grows with the classes.

    network = build("vgg16", num_classes=7)
    h, z, logits = network(x)       # x float [B,3,32,32] in 0..1 -> h [B,512], unit z [B,128], logits [B,7]

    network = load("RUN/checkpoint.pt")     # what a run has learned
    small = compact(network)                # without its dead filters

The images are normalised inside, so that a saved network needs nothing but pixels. The VGGs follow Simonyan & Zisserman
2014 (arXiv 1409.1556) with batch norm and one pooled feature vector in place of the fully connected layers; any
classification model of torchvision serves as encoder too, with its stem changed for small images.
"""

import copy
import difflib
from collections.abc import Sequence
from os import PathLike

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Channels of the 3x3 convolutions; "M" is a 2x2 max-pool.
CONFIGS: dict[str, list[int | str]] = {
    "cnn": [32, "M", 64, "M", 128, "M"],
    "vgg-small": [32, 32, "M", 64, 64, "M", 128, 128, "M", 256, 256, "M"],
    "vgg11": [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],
    "vgg16": [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"],
}


class VGG(nn.Sequential):
    """Convolutions with batch norm and ReLU, pooled to one vector: [B,3,H,W] -> [B,dim]."""

    def __init__(self, config: Sequence[int | str]):
        layers: list[nn.Module] = []
        width = 3
        for item in config:
            if item == "M":
                layers.insert(-1, nn.MaxPool2d(2))  # before the ReLU: the same result, and a quarter of the values to rectify
            else:
                layers += [nn.Conv2d(width, item, 3, padding=1, bias=False), nn.BatchNorm2d(item), nn.ReLU(inplace=True)]
                width = item
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.config = list(config)
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class CosineHead(nn.Linear):
    """Scaled cosine between an embedding and one direction per class, plus a bias: [B,D] -> [B,C], computed in float32.

    A new class needs nothing but a direction, so its row can be imprinted (Qi, Brown & Lowe 2018, arXiv 1712.07136); the bias,
    zero at first, says how readily the unit speaks up. scale: inverse temperature of the softmax over the cosines (16).
    """

    def __init__(self, dim: int, num_classes: int, scale: float = 16.0):
        super().__init__(dim, num_classes)
        self.scale = scale
        nn.init.zeros_(self.bias)

    def forward(self, h: Tensor) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):
            return self.scale * F.linear(F.normalize(h.float(), dim=1), F.normalize(self.weight, dim=1)) + self.bias


class Network(nn.Module):
    """encoder [B,3,H,W] -> [B,dim], projector -> unit rows [B,projection], head -> logits [B,C]."""

    def __init__(self, encoder: nn.Module, dim: int, num_classes: int, projection: int, mean: Sequence, std: Sequence):
        super().__init__()
        self.encoder = encoder
        self.norm = nn.BatchNorm1d(dim, affine=False)
        self.projector = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(inplace=True), nn.Linear(dim, projection))
        self.head = CosineHead(dim, num_classes)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1))

    def embed(self, x: Tensor) -> Tensor:
        """Images float [B,3,H,W] in 0..1 -> h [B,dim]."""
        return self.norm(self.encoder((x - self.mean) / self.std))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images float [B,3,H,W] in 0..1 -> h [B,dim], z [B,projection] (unit rows), logits [B,C]; z and logits float32."""
        h = self.embed(x)
        return h, F.normalize(self.projector(h).float(), dim=1), self.head(h)


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) network: its weights and running statistics (mean teacher, arXiv 1703.01780)."""
    for slow, fast in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
        if slow.is_floating_point():
            slow.lerp_(fast, 1 - decay)


def build(
    name: str | Sequence[int | str],
    num_classes: int,
    projection: int = 128,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.25, 0.25, 0.25),
) -> Network:
    """A network with the encoder `name`: one of CONFIGS, a list like them, or a torchvision classification model ("resnet18", ...).

    num_classes: units the head starts with; projection: width of z; mean, std: of the images, per channel, in 0..1.
    Raises ValueError for a name that is not known or a model that cannot take 32x32 images.
    """
    config = CONFIGS.get(name) if isinstance(name, str) else name
    if config:
        encoder, dim = VGG(config), [c for c in config if c != "M"][-1]
    else:
        encoder, dim = torchvision_encoder(name)
    return Network(encoder, dim, num_classes, projection, mean, std)


def load(path: str | PathLike) -> Network:
    """The network that a run keeps in its checkpoint.pt, or that was written from `pack`; in eval mode, on the CPU.

    network.names: the class that each unit of the head stands for, None where it has no name.
    """
    saved = torch.load(path, map_location="cpu", weights_only=True)
    name, weights = (saved["args"]["model"], saved["average"]) if "args" in saved else (saved["model"], saved["network"])
    network = build(name, len(weights["head.weight"]), len(weights["projector.2.weight"]))
    network.load_state_dict(weights)
    network.names = saved["names"]
    return network.eval()


def pack(network: Network) -> dict:
    """What `load` reads, of a network with a VGG as encoder: its layers, its weights and the names of its units, where it has any."""
    names = getattr(network, "names", [None] * network.head.out_features)
    return {"model": network.encoder.config, "network": network.state_dict(), "names": names}


@torch.no_grad()
def compact(network: Network) -> Network:
    """A copy of a network with a VGG as encoder without its dead filters: in eval mode the same outputs, with less to compute.

    A filter is dead whose batch norm has neither scale nor shift left (`grow_prune.prune_filters`). The last convolution keeps
    all of its filters, which are the embedding. Raises ValueError for another encoder.
    """
    if not isinstance(network.encoder, VGG):
        raise ValueError("only the encoders cnn, vgg-small, vgg11 and vgg16 can be made compact")
    small = copy.deepcopy(network)
    convs = [m for m in network.encoder if isinstance(m, nn.Conv2d)]
    norms = [m for m in network.encoder if isinstance(m, nn.BatchNorm2d)]
    alive = [(norm.weight != 0) | (norm.bias != 0) for norm in norms[:-1]] + [torch.ones_like(norms[-1].bias, dtype=torch.bool)]
    widths = iter(int(a.sum()) for a in alive)
    small.encoder = VGG([item if item == "M" else next(widths) for item in network.encoder.config])
    before = slice(None)
    new = [m for m in small.encoder if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    for old_conv, old_norm, conv, norm, out in zip(convs, norms, new[::2], new[1::2], alive, strict=True):
        conv.weight.copy_(old_conv.weight[out][:, before])
        norm.load_state_dict({key: value[out] if value.ndim else value for key, value in old_norm.state_dict().items()})
        before = out
    return small.to(network.mean.device).train(network.training)


def torchvision_encoder(name: str) -> tuple[nn.Module, int]:
    """A torchvision classification model without its classifier, for 32x32 images, and the width of its features.

    Made for 224x224, these models reduce an image by four before the first block, which costs a 32x32 image most of its
    detail: the first convolution is replaced by a 3x3 one of stride 1 and a max-pool right behind it is removed. A vision
    transformer (vit_*) gets patches of 4x4 pixels.
    """
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, [*CONFIGS, *known], n=1)
        hint = f", did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"unknown model '{name}'{hint}; use {', '.join(CONFIGS)} or a torchvision classification model")
    options: dict = {"weights": None}
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_"):
        options |= {"image_size": 32}
    try:
        encoder = models.get_model(name, **options)
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"model '{name}' cannot be made for 32x32 images ({str(error)[:80]})") from None

    # The classifier is the last layer with 1000 outputs; whatever pools or flattens around it stays.
    last = [n for n, m in encoder.named_modules() if getattr(m, "out_features", getattr(m, "out_channels", 0)) == 1000][-1]
    encoder.set_submodule(last, nn.Identity())
    if name.startswith("vit_"):
        encoder.patch_size = 4
        width = encoder.hidden_dim
        encoder.conv_proj = nn.Conv2d(3, width, 4, 4)
        encoder.encoder.pos_embedding = nn.Parameter(torch.empty(1, 8 * 8 + 1, width).normal_(std=0.02))
    else:
        stem, conv = next((n, m) for n, m in encoder.named_modules() if isinstance(m, nn.Conv2d))
        if max(conv.stride) > 1:
            small = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=conv.bias is not None)
            nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
            encoder.set_submodule(stem, small)
        for pool in ("maxpool", "maxpool1", "features.pool0"):
            if any(n == pool for n, _ in encoder.named_modules()):
                encoder.set_submodule(pool, nn.Identity())
    try:
        with torch.no_grad():
            features = encoder.eval()(torch.zeros(2, 3, 32, 32))
        if features.ndim != 2 or not features.isfinite().all():
            raise ValueError("no feature vector")
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f"model '{name}' cannot take 32x32 images ({str(error).splitlines()[0]})") from None
    return encoder.train(), features.shape[1]
