"""Folding in models of torchvision, timm and others: the norms that torch.fx finds pairs for, and the same outputs."""

import warnings
from collections import Counter
from functools import partial
from importlib.util import find_spec

import pytest
import torch
import zoo
from conftest import OPTIONAL
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

import syncbn

timm = pytest.importorskip("timm", reason="timm is not installed")
torchvision = pytest.importorskip("torchvision", reason=OPTIONAL["torchvision"])
from timm.layers.norm_act import FrozenBatchNormAct2d  # noqa: E402
from timm.models import get_notrace_functions, get_notrace_modules  # noqa: E402
from torchvision.ops.misc import FrozenBatchNorm2d  # noqa: E402

FROZEN = (FrozenBatchNorm2d, FrozenBatchNormAct2d)
NORM = (_BatchNorm, *FROZEN)


class Tracer(fx.Tracer):
    def __init__(self):
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))

    def is_leaf_module(self, module, name):
        opaque = isinstance(module, tuple(get_notrace_modules())) and not any(
            isinstance(m, NORM) for m in module.modules()
        )
        return opaque or isinstance(module, (_ConvNd, nn.Linear, *NORM)) or super().is_leaf_module(module, name)


def is_shape(node):
    return node.target in ("size", "dim") or (node.target is getattr and node.args[1] in ("shape", "dtype", "device"))


def pairs_by_fx(model):
    """Name the norms whose input is the one output of a convolution or linear layer, which nothing else reads."""
    nodes = [*Tracer().trace(model).nodes]
    num_calls = Counter(node.target for node in nodes if node.op == "call_module")
    modules, found = dict(model.named_modules()), set()
    for node in nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], NORM) or num_calls[node.target] > 1:
            continue
        before = node.args[0]
        is_layer = before.op == "call_module" and isinstance(modules[before.target], _ConvNd | nn.Linear)
        if is_layer and num_calls[before.target] == 1 and [u for u in before.users if not is_shape(u)] == [node]:
            found.add(node.target)
    return found


def trained(model):
    """Give every norm statistics, weights and biases of its own; with these, activations neither die nor explode."""
    generator = torch.Generator().manual_seed(1)
    for norm in model.modules():
        if isinstance(norm, NORM):
            norm.running_mean.normal_(0.1, 0.2, generator=generator)
            norm.running_var.uniform_(0.3, 2, generator=generator)
            if norm.weight is not None:
                norm.weight.data.uniform_(0.4, 1.2, generator=generator)
                norm.bias.data.normal_(0.1, 0.3, generator=generator)
    return model.eval()


def tensors(output):
    if isinstance(output, torch.Tensor):
        return [output] * output.is_floating_point()
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def check(model, args, expected=None):
    """Fold, and compare with fx, or with ``expected``: the number of norms that stay."""
    norms = {name for name, module in model.named_modules() if isinstance(module, NORM)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folded = syncbn.fold(model, args)
    stayed = {name for name, module in folded.named_modules() if isinstance(module, NORM)}
    if expected is None:
        assert norms - stayed == pairs_by_fx(model)
    else:
        assert len(stayed) == expected
    with torch.no_grad():
        before, after = tensors(model(*args)), tensors(folded(*args))
    magnifies = any("magnifies rounding" in str(warning.message) for warning in caught)  # in float64 they agree
    for a, b in zip(after, before, strict=True):
        assert torch.isfinite(b).all()
        assert b.std() > 1e-3 * b.abs().max()  # an output that says something
        assert (a - b).abs().max() <= (1e-4 if magnifies else 1e-5) * (b.max() - b.min())
    said = "\n".join(str(warning.message) for warning in caught if "these stayed" in str(warning.message))
    listed = {name.strip() for line in said.splitlines()[1:] for name in line.split(":")[0].split(",")}
    assert listed == stayed
    return said


def image(side, channels=3, num=2):
    return torch.randn(num, channels, side, side, generator=torch.Generator().manual_seed(2))


def cases(names, quick):
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in names]


TORCHVISION = [
    "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "regnet_x_400mf", "regnet_y_400mf", "mobilenet_v2",
    "mobilenet_v3_small", "mobilenet_v3_large", "shufflenet_v2_x0_5", "shufflenet_v2_x2_0", "googlenet",
    "inception_v3", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "mnasnet0_5", "mnasnet1_3", "vgg11_bn",
    "vgg16_bn", "maxvit_t", "fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large", "quantized_resnet18", "quantized_mobilenet_v2", "quantized_shufflenet_v2_x0_5",
    "quantized_googlenet",
]  # fmt: skip
SIDES = {"inception_v3": 96, "maxvit_t": 224}


@pytest.mark.parametrize("name", cases(TORCHVISION, {"shufflenet_v2_x0_5"}))
def test_torchvision(name):
    torch.manual_seed(0)
    options = {"init_weights": False} if name.endswith(("googlenet", "inception_v3")) else {}
    if name.startswith(("fcn", "deeplab", "lraspp")):
        options["weights_backbone"] = None
    model = trained(torchvision.models.get_model(name, weights=None, **options))
    check(model, (image(SIDES.get(name, 64)),))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["r3d_18", "mc3_18", "r2plus1d_18", "s3d"])
def test_videos(name):
    torch.manual_seed(0)
    model = trained(torchvision.models.get_model(name, weights=None))
    side = 224 if name == "s3d" else 48
    check(model, (torch.randn(1, 3, 16, side, side, generator=torch.Generator().manual_seed(2)),))


@pytest.mark.slow
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_backbones_of_detectors(name, norm):
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    torch.manual_seed(0)
    model = trained(resnet_fpn_backbone(backbone_name=name, weights=None, norm_layer=norm))
    check(model, (image(64),), 0)


@pytest.mark.slow
def test_detectors_by_their_backbone():
    torch.manual_seed(0)
    for name in (
        "ssdlite320_mobilenet_v3_large",
        "fasterrcnn_mobilenet_v3_large_320_fpn",
        "retinanet_resnet50_fpn_v2",
    ):
        detector = torchvision.models.get_model(name, weights=None, weights_backbone=None)
        check(trained(detector.backbone), (image(64),), 0)


TIMM = {  # the side of its images
    "resnet18": 64, "resnet26d": 64, "resnext26ts": 64, "seresnet18": 64, "ecaresnet26t": 64, "skresnet18": 64,
    "resnest14d": 64, "res2net50_26w_4s": 64, "res2next50": 64, "regnetx_002": 64, "regnety_002": 64,
    "regnetz_b16": 64,
    "mobilenetv2_035": 64, "mobilenetv3_small_050": 64, "mobilenetv4_conv_small_035": 64, "mobilenet_edgetpu_100": 64,
    "mnasnet_small": 64, "semnasnet_050": 64, "spnasnet_100": 64, "fbnetc_100": 64, "fbnetv3_b": 64,
    "efficientnet_b0": 64, "efficientnet_lite0": 64, "efficientnetv2_rw_t": 64, "tf_efficientnet_b0": 64,
    "tf_efficientnetv2_b0": 64, "tf_mobilenetv3_small_minimal_100": 64, "mixnet_s": 64, "tf_mixnet_s": 64,
    "tinynet_e": 64, "lcnet_035": 64, "hardcorenas_a": 64, "rexnet_100": 64, "hrnet_w18_small": 64, "dla34": 64,
    "dla46x_c": 64, "dpn48b": 64, "densenet121": 64, "ghostnet_050": 64, "ghostnetv2_100": 64, "repghostnet_050": 64,
    "repvgg_a0": 64, "mobileone_s0": 64, "fastvit_t8": 64, "cspresnet50": 64,
    "cspdarknet53": 64, "cs3darknet_s": 64, "darknet53": 64, "vovnet39a": 64, "ese_vovnet19b_slim_dw": 64,
    "selecsls42": 64, "hgnet_tiny": 64, "hgnetv2_b0": 64, "vgg11_bn": 64, "inception_v3": 96, "inception_v4": 96,
    "inception_resnet_v2": 96, "xception41": 96, "legacy_xception": 96, "pnasnet5large": 96,
    "mobilevit_xxs": 64, "mobilevitv2_050": 64, "levit_128s": 224, "levit_conv_128s": 224,
    "efficientformer_l1": 224, "efficientvit_b0": 64, "repvit_m0_9": 64, "coatnet_nano_rw_224": 224,
    "botnet26t_256": 256,
    "lambda_resnet26t": 256, "halonet26t": 256, "eca_botnext26ts_256": 256, "tresnet_m": 64, "gernet_s": 64,
    "visformer_tiny": 224, "pit_ti_224": 224, "crossvit_9_240": 240, "tiny_vit_5m_224": 224, "starnet_s1": 64,
    "fasternet_t0": 64, "shvit_s1": 64, "swiftformer_xs": 224, "test_efficientnet": 64, "test_resnet": 64,
}  # fmt: skip


# torch.fx cannot follow them; all their BatchNorms stand behind convolutions.
UNTRACED = {"mobilevit_xxs", "mobilevitv2_050", "efficientvit_b0", "tiny_vit_5m_224"}


@pytest.mark.parametrize("name", cases(TIMM, {"test_efficientnet"}))
def test_timm(name):
    torch.manual_seed(0)
    check(trained(timm.create_model(name, num_classes=5)), (image(TIMM[name]),), 0 if name in UNTRACED else None)


@pytest.mark.slow
def test_the_reasons_of_two_models():
    torch.manual_seed(0)
    said = check(trained(timm.create_model("densenet121", num_classes=5)), (image(64),))
    assert said.startswith("syncbn.fold folded 59 of 121 norms; these stayed:")
    assert len(said.splitlines()) == 2
    assert said.endswith("its input is not the very output of a convolution or linear layer")
    said = check(trained(torchvision.models.googlenet(weights=None, init_weights=False)), (image(64),), 2)
    assert said.endswith("  aux1.conv.bn, aux2.conv.bn: the example did not reach it")


@pytest.mark.slow
def test_a_model_whose_norms_all_stand_behind_activations():
    model = trained(timm.create_model("convmixer_768_32", num_classes=5))
    with pytest.raises(
        ValueError, match=r"(?s)none of the norms can be folded.*stem\.2, .*blocks\.31\.3: its input is not"
    ):
        syncbn.fold(model, image(64))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_converted_and_reverted_models(name):
    torch.manual_seed(0)
    model = trained(timm.create_model(name, num_classes=5))
    plain, x = syncbn.fold(model, image(64)), image(64)
    with torch.no_grad():
        expected = plain(x)
        for change in (syncbn.convert, partial(syncbn.convert, norm="frozen"), syncbn.revert):
            folded = syncbn.fold(change(model), x)
            assert torch.equal(folded(x), expected)
            assert [type(m) for m in folded.modules()] == [type(m) for m in plain.modules()]
    graph = fx.symbolic_trace(torchvision.models.resnet18(weights=None).eval())
    assert not any(isinstance(module, NORM) for module in syncbn.fold(graph, x).modules())


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["resnet18", "mobilenet_v2", "efficientnet-b0", "tu-resnet10t"])
@pytest.mark.parametrize("name", ["Unet", "UnetPlusPlus", "Linknet", "FPN", "DeepLabV3Plus", "PAN"])
def test_segmentation(name, encoder):
    smp = pytest.importorskip("segmentation_models_pytorch", reason="segmentation_models_pytorch is not installed")
    torch.manual_seed(0)
    num_unreached = 1 if encoder.startswith("efficientnet") else 0  # that of its classifier
    model = trained(getattr(smp, name)(encoder, encoder_weights=None, classes=2))
    assert check(model, (image(128),), num_unreached).count("did not reach") == num_unreached


# Norms before convolutions, with a residual connection or without; and behind a reshape.
STAY = {"monai SegResNet": 4, "monai DenseNet121": 6, "transformers LevitModel": 22}
OTHERS = [name for name in zoo.MODELS if not name.startswith(("timm ", "torchvision ", "torch_geometric "))]


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_packages(name):
    package = name.split()[0]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    model, samples = zoo.build(name)
    check(trained(model), tuple(zoo.joined(samples)), STAY.get(name, 0))


def up(channels, out, groups):
    return [nn.ConvTranspose2d(channels, out, 4, 2, 1, groups=groups), nn.BatchNorm2d(out), nn.ReLU()]


class UNet(nn.Module):
    """With transposed convolutions in groups, and skips from behind the norms."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, groups=g, bias=False), nn.BatchNorm2d(o), nn.ReLU())
            for i, o, g in ((4, 8, 1), (8, 16, 2), (16, 32, 16))
        )
        self.up = nn.ModuleList(nn.Sequential(*up(*sizes)) for sizes in ((32, 16, 4), (32, 8, 8), (16, 16, 16)))

    def forward(self, x):
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
        for number, layers in enumerate(self.up):
            x = layers(x if number == 0 else torch.cat([x, skips[-1 - number]], 1))
        return x


def test_a_u_net_with_grouped_transposed_convolutions():
    torch.manual_seed(0)
    model = trained(UNet())
    assert len(pairs_by_fx(model)) == 6
    check(model, (image(16, 4),))
