"""The network: an encoder, a projector for the self-supervised losses, a head that grows with the classes.

    network = build("vgg16", num_classes=7)
    h, z, logits = network(x)       # x float [B,3,32,32] in 0..1 -> h [B,512], unit z [B,128], logits [B,7]

    network = load("RUN")                           # what a run has learned
    torch.save(pack(compact(network)), "small.pt")  # without its dead filters; load reads this too

It normalises images.
"""

import copy
import difflib
import os
import zipfile
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.optim import SGD, Optimizer

# Channels of the 3x3 convolutions; "M" is a 2x2 max-pool.
CONFIGS = {
    "cnn": [32, "M", 64, "M", 128, "M"],
    "vgg-small": [32, 32, "M", 64, 64, "M", 128, 128, "M", 256, 256, "M"],
    "vgg11": [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],
    "vgg16": [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"],
}
LARGE = 128  # from this image size on, torchvision models keep their stem, which leaves 32x32 pixels


class VGG(nn.Sequential):
    """Convolutions with batch norm and ReLU, pooled to one vector: [B,3,H,W] -> [B,dim] (arXiv 1409.1556)."""

    def __init__(self, config: Sequence[int | str]):
        layers: list[nn.Module] = []
        width = 3
        for item in config:
            if item == "M":  # before the ReLU: less to do
                layers.insert(-1, nn.MaxPool2d(2, ceil_mode=True))
            else:
                conv = nn.Conv2d(width, item, 3, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(item), nn.ReLU(inplace=True)]
                width = item
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.config = list(config)
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class CosineHead(nn.Linear):
    """Scaled cosine between an embedding and one direction per class, plus a bias: [B,D] -> float32 [B,C].

    A class needs only a direction, which can be imprinted (arXiv 1712.07136). scale: inverse temperature.
    """

    def __init__(self, dim: int, num_classes: int, scale: float = 16.0):
        super().__init__(dim, num_classes)
        self.scale = scale
        nn.init.zeros_(self.bias)

    def forward(self, h: Tensor) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):
            cosine = F.linear(F.normalize(h.float(), dim=-1), F.normalize(self.weight.float(), dim=1))
            return self.scale * cosine + self.bias.float()


class Network(nn.Module):
    """Images [B,3,H,W] -> normalise -> encoder [B,dim] -> projector [B,projection], head [B,C].

    spec, image_size: see `build`; names: of the units; answering: what tells unknown images.
    """

    names: list | None = None
    answering: dict | None = None

    def __init__(
        self, encoder: nn.Module, dim: int, units: int, projection: int, mean: Sequence, std: Sequence
    ):
        super().__init__()
        self.encoder = encoder
        self.norm = nn.BatchNorm1d(dim, affine=False)
        self.projector = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(inplace=True), nn.Linear(dim, projection))
        self.head = CosineHead(dim, units)
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1))

    def embed(self, x: Tensor) -> Tensor:
        """Images [B,3,H,W], floating point in 0..1 or uint8 in 0..255 -> h [B,dim]."""
        if x.ndim != 4 or x.shape[1] != 3 or not (x.dtype == torch.uint8 or x.is_floating_point()):
            raise ValueError(f"images must be uint8 or float [B,3,H,W], not {x.dtype} {list(x.shape)}")
        x = x / 255 if x.dtype == torch.uint8 else x
        return self.norm(self.encoder((x.to(self.mean.dtype) - self.mean) / self.std))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images as for `embed` -> h [B,dim], unit rows z [B,projection], logits [B,C], both float32."""
        h = self.embed(x)
        return h, F.normalize(self.projector(h).float(), dim=1), self.head(h)


@torch.no_grad()
def update_ema(ema: nn.Module, network: nn.Module, decay: float) -> None:
    """ema <- decay ema + (1 - decay) network, running statistics too (mean teacher, arXiv 1703.01780)."""
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be in 0..1, not {decay}")
    for part in nn.Module.parameters, nn.Module.buffers:
        for slow, fast in zip(part(ema), part(network), strict=True):
            if slow.is_floating_point():
                slow.lerp_(fast, 1 - decay)


def build(
    name: str | Sequence,
    num_classes: int,
    projection: int = 128,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.25, 0.25, 0.25),
    image_size: int = 32,
) -> Network:
    """A network with the encoder `name`: one of CONFIGS, a list like them, or a torchvision classifier.

    num_classes: units of the head; projection: width of z; mean, std: of the channels; image_size: a multiple
    of 8 up to 224. Raises ValueError for unknown names and unsuitable sizes.
    """
    if num_classes < 1 or projection < 1 or len(mean) != 3 or len(std) != 3:
        raise ValueError("num_classes and projection must be above 0, mean and std 3 numbers each")
    if image_size not in range(8, 225, 8):
        raise ValueError(f"image_size must be a multiple of 8 from 8 to 224, not {image_size}")
    config = CONFIGS.get(name) if isinstance(name, str) else list(name)
    if config is None:
        encoder, dim = torchvision_encoder(name, image_size)
    else:
        widths = [c for c in config if c != "M"]
        if not widths or not all(isinstance(c, int) and c > 0 for c in widths):
            raise ValueError(f"name must list numbers of channels and 'M', not {config}")
        encoder, dim = VGG(config), widths[-1]
    network = Network(encoder, dim, num_classes, projection, mean, std)
    network.spec, network.image_size = name if isinstance(name, str) else config, image_size
    return network


@torch.random.fork_rng(devices=())  # leaves later draws alone
def load(path: str | os.PathLike) -> Network:
    """The network of a run (its folder, its checkpoint.pt) or from `pack`, in eval mode; else ValueError."""
    path = os.path.join(path, "checkpoint.pt") if os.path.isdir(path) else path
    try:
        if zipfile.ZipFile(path).testzip():
            raise ValueError("damaged")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        args, weights = saved["args"], saved["ema"]
        units, projection = len(weights["head.weight"]), len(weights["projector.2.weight"])
        network = build(args["model"], units, projection, image_size=args["image_size"])
        network.load_state_dict(weights)
        network.names, network.answering = saved["names"], saved["answering"]
    except OSError:
        raise
    except Exception as error:  # as torch raises for foreign files
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: not a network saved by a run or from pack ({reason})") from None
    return network.eval()


def pack(network: Network) -> dict:
    """What `load` reads, like a run's checkpoint."""
    args = {"model": network.spec, "image_size": network.image_size}
    names = network.names or [None] * network.head.out_features
    return {"args": args, "ema": network.state_dict(), "names": names, "answering": network.answering}


@torch.random.fork_rng(devices=())
@torch.no_grad()
def compact(network: Network) -> Network:
    """A copy of a network with a VGG, without dead filters: faster, the same outputs in eval mode.

    A filter is dead if its batch norm has neither scale nor shift. The last layer, the embedding, keeps all.
    """
    if not isinstance(network.encoder, VGG):
        raise ValueError("only a network with a VGG can be made compact")
    alive = [(m.weight != 0) | (m.bias != 0) for m in network.encoder if isinstance(m, nn.BatchNorm2d)]
    alive[-1] = torch.ones_like(alive[-1])
    small = copy.deepcopy(network)
    widths, masks = iter(int(a.sum()) for a in alive), iter(alive)
    small.spec = [item if item == "M" else next(widths) for item in network.encoder.config]
    small.encoder = VGG(small.spec).to(network.mean)  # its device and dtype
    out = slice(None)
    for old, new in zip(network.encoder, small.encoder, strict=True):
        if isinstance(old, nn.Conv2d):
            before, out = out, next(masks)
            new.weight.copy_(old.weight[out][:, before])
        elif isinstance(old, nn.BatchNorm2d):
            new.load_state_dict({k: v[out] if v.ndim else v for k, v in old.state_dict().items()})
    return small.train(network.training)


def torchvision_encoder(name: str, size: int) -> tuple[nn.Module, int]:
    """A torchvision model without its classifier, for size x size images, and its width."""
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, [*CONFIGS, *known], n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"use {', '.join(CONFIGS)} or a torchvision model"
        raise ValueError(f"unknown model '{name}', {hint}")
    options = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    if name.startswith("vit_"):
        patch = int(name[-2:])
        options = {"image_size": patch * max(1, size // patch)}
    try:
        encoder = models.get_model(name, weights=None, **options)
        modules = encoder.named_modules()
        # The classifier is the last with 1000 outputs; pools around it stay.
        layers = [(n, vars(m).get("out_features", vars(m).get("out_channels"))) for n, m in modules]
        encoder.set_submodule([n for n, outputs in layers if outputs == 1000][-1], nn.Identity())
        adapt_stem(encoder, size)
        with torch.no_grad():
            features = encoder.eval()(torch.zeros(2, 3, size, size))
        if features.ndim != 2 or not features.isfinite().all():
            raise ValueError("no feature vector")
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0][:80]
        raise ValueError(f"model '{name}' cannot take {size}x{size} images ({reason})") from None
    return encoder.train(), features.shape[1]


def adapt_stem(encoder: nn.Module, size: int) -> None:
    """Adapt the stem of a torchvision model, made for 224x224 images, to size x size images.

    Below LARGE, a 3x3 convolution of stride 1 replaces the first one, and no max-pool follows. A vision
    transformer gets 8x8 patches, unless the image is LARGE and a multiple of its own patches.
    """
    if hasattr(encoder, "conv_proj"):
        if size < LARGE or size % encoder.patch_size:
            width, encoder.image_size, encoder.patch_size = encoder.hidden_dim, size, size // 8
            encoder.conv_proj = nn.Conv2d(3, width, size // 8, size // 8)
            encoder.encoder.pos_embedding = nn.Parameter(torch.empty(1, 8 * 8 + 1, width).normal_(std=0.02))
    elif size < LARGE:
        stem, conv = next((n, m) for n, m in encoder.named_modules() if isinstance(m, nn.Conv2d))
        if max(conv.stride) > 1:
            small = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=conv.bias is not None)
            nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
            encoder.set_submodule(stem, small)
        for pool in {"maxpool", "maxpool1", "features.pool0"} & {n for n, _ in encoder.named_modules()}:
            encoder.set_submodule(pool, nn.Identity())


def configure_optimizer(network: Network, lr: float, weight_decay: float = 5e-4) -> SGD:
    """SGD with Nesterov momentum. Weights of layers decay; biases, norms, embeddings and the head do not.

    On a GPU the rate is a tensor, so a captured step sees it change; fused SGD reads it without waiting.
    """
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
    modules = [m for m in network.modules() if isinstance(m, layers) and m is not network.head]
    decaying = {id(getattr(m, name, None)) for m in modules for name in ("weight", "in_proj_weight")}
    groups = [[p for p in network.parameters() if (id(p) in decaying) == decays] for decays in (True, False)]
    params = [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]
    device = network.mean.device
    rate = {"lr": torch.tensor(lr, device=device), "fused": True} if device.type == "cuda" else {"lr": lr}
    return SGD(params, momentum=0.9, nesterov=True, **rate)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of all groups; a tensor in place, for captured steps."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"].fill_(lr) if torch.is_tensor(group["lr"]) else lr


@torch.no_grad()
def recompute_batchnorm(network: nn.Module, x: Tensor, bf16: bool = False) -> None:
    """Recompute batch-norm statistics, which averaged weights need, on images uint8 [N,3,H,W], if N > 1."""
    if x.dtype != torch.uint8:
        raise ValueError(f"x must be uint8, not {x.dtype}")
    if len(x) < 2:
        return
    parts = x.tensor_split(max((len(x) + 511) // 512, x.numel() >> 22))
    batches = (part.float().div_(255).contiguous(memory_format=torch.channels_last) for part in parts)
    fresh = copy.deepcopy(network)  # a failure leaves it alone
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        torch.optim.swa_utils.update_bn(batches, fresh)
    network.load_state_dict(fresh.state_dict())


def supports_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(features.get(name) for name in ("avx512_bf16", "amx_bf16"))


class CUDAGraphStep:
    """A training step as a CUDA graph: Python starts short kernels more slowly than a GPU runs them.

    The first call runs eagerly, the second is captured, others replay it. What it touches must keep its
    address, x its shape; a call overwrites the last result. generator: what it draws from; pool: its memory.
    """

    def __init__(self, function: Callable, generator: Generator, pool: tuple[int, int]):
        self.function, self.generator, self.pool = function, generator, pool
        self.x = self.graph = None

    def __call__(self, x: Tensor):
        if self.x is None:
            self.x = x.clone()
            return self.function(x)
        self.x.copy_(x)
        if self.graph is None:
            with torch.cuda.device(x.device):
                self.graph = torch.cuda.CUDAGraph()
                if torch.__version__ < "2.14":  # later ones register them
                    self.graph.register_generator_state(self.generator)
                with torch.cuda.graph(self.graph, pool=self.pool):
                    self.result = self.function(self.x)
        self.graph.replay()
        return self.result


def capture(functions: Sequence[Callable], optimizer: Optimizer, generator: Generator) -> list:
    """Each training step as a `CUDAGraphStep`; they share memory: one runs at a time."""
    for p in (p for group in optimizer.param_groups for p in group["params"]):  # as fused SGD needs
        optimizer.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
    pool = torch.cuda.graph_pool_handle()
    return [CUDAGraphStep(function, generator, pool) for function in functions]
