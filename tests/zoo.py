"""Models of eight packages as their users build them: random weights, small inputs, nothing that is drawn in a step.

``build(name)`` gives the model in float64 and a list of samples, ``joined(samples)`` the arguments of a call. An
output's first dimension is the samples', or the nodes' of the samples' graphs.
"""

import os
import tempfile
import warnings
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

MODELS = {}  # "package name": makes (model, samples)
NUM_SAMPLES = 3


def add(name, make, *shape):
    """Enter a model, made by ``make()``, whose samples are of ``shape``; without one, ``make`` gives them as well."""
    MODELS[name] = (lambda: (make(), normal(NUM_SAMPLES, *shape).unbind())) if shape else make


def build(name):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what packages say while they are imported
        model, samples = MODELS[name]()
    generator = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd):
            layer.p = 0.0
        if isinstance(layer, _BatchNorm) and layer.affine:  # some begin at weight 0: no gradient behind them
            nn.init.uniform_(layer.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(layer.bias, 0.0, 0.3, generator=generator)
    return model.double().train(), samples


def joined(samples):
    if isinstance(samples[0], torch.Tensor):
        return (torch.stack(samples),)
    starts = [0]
    for nodes, *_ in samples:
        starts.append(starts[-1] + len(nodes))
    nodes, edges, *rest = zip(*samples, strict=True)
    edges = torch.cat([edge + start for edge, start in zip(edges, starts, strict=False)], 1)
    return torch.cat(nodes), edges, *map(torch.cat, rest)


def normal(*shape, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator) * 1.5 + 0.5


def graphs(num_edge_features=0):
    """Three graphs of 5, 9 and 6 nodes of 8 features."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for seed, num_nodes in enumerate([5, 9, 6]):
        edges = torch.randint(0, num_nodes, (2, 3 * num_nodes), generator=generator)
        features = [normal(3 * num_nodes, num_edge_features, seed=seed)] * (num_edge_features > 0)
        made.append((normal(num_nodes, 8, seed=seed), edges, *features))
    return made


class Chain(nn.Sequential):
    """Modules one after the other; what one returns as a tuple, list or dict, the next gets as a list."""

    def forward(self, x):
        for module in self:
            x = module(list(x.values()) if isinstance(x, dict) else x)
        return x


def of_timm(name, **options):
    import timm

    return timm.create_model(name, num_classes=3, **options)


for name, side, options in [
    ("resnet10t", 64, {}),
    ("resnest14d", 64, {}),
    ("densenet121", 64, {"block_config": (2, 2, 2), "growth_rate": 8}),
    ("efficientnet_b0", 64, {}),
    ("mobilenetv3_small_050", 64, {}),
    ("regnety_002", 64, {}),
    ("repvgg_a0", 32, {}),
    ("mobileone_s0", 64, {}),
    ("cs3darknet_s", 64, {}),
    ("fastvit_t8", 64, {}),
    ("levit_128s", 64, {"img_size": 64}),
    ("tiny_vit_5m_224", 64, {"drop_path_rate": 0.0}),
]:
    add(f"timm {name}", partial(of_timm, name, **options), 3, side, side)


def convmixer():
    from timm.models.convmixer import ConvMixer

    return ConvMixer(dim=16, depth=3, kernel_size=5, patch_size=4, num_classes=3)


add("timm convmixer", convmixer, 3, 32, 32)


def of_torchvision(name, **options):
    from torchvision import models

    return models.get_model(name, weights=None, **options)


def feature_pyramid():
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    return resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5)


def ssdlite():
    detector = of_torchvision("ssdlite320_mobilenet_v3_large", weights_backbone=None, num_classes=3)
    return Chain(detector.backbone, detector.head)


add("torchvision resnet18", partial(of_torchvision, "resnet18", num_classes=3), 3, 64, 64)
add("torchvision shufflenet_v2_x0_5", partial(of_torchvision, "shufflenet_v2_x0_5", num_classes=3), 3, 64, 64)
add("torchvision resnet_fpn_backbone", feature_pyramid, 3, 64, 64)
add("torchvision ssdlite320_mobilenet_v3_large", ssdlite, 3, 96, 96)
add("torchvision r3d_18", partial(of_torchvision, "r3d_18", num_classes=3), 3, 4, 32, 32)
for name in ["deeplabv3_resnet50", "lraspp_mobilenet_v3_large"]:
    options = {"weights_backbone": None, "num_classes": 3}
    add(f"torchvision {name}", partial(of_torchvision, name, **options), 3, 48, 48)


def of_smp(name, encoder):
    import segmentation_models_pytorch

    return getattr(segmentation_models_pytorch, name)(encoder, encoder_weights=None, classes=2)


for name, encoder in [
    ("Unet", "resnet18"),
    ("FPN", "timm-mobilenetv3_small_minimal_100"),
    ("DeepLabV3Plus", "mobilenet_v2"),
    ("Unet", "tu-resnet10t"),
]:
    case = f"segmentation_models_pytorch {name} {encoder}"
    add(case, partial(of_smp, name, encoder), 3, 64, 64)


def of_ultralytics(cls, config):
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())
    os.environ["YOLO_OFFLINE"] = "true"
    from ultralytics.nn import tasks

    return getattr(tasks, cls)(config, nc=3, verbose=False)


for config, task in [("yolo11n", "Detection"), ("yolov8n", "Detection"), ("yolo11n-seg", "Segmentation")]:
    add(f"ultralytics {config}", partial(of_ultralytics, f"{task}Model", f"{config}.yaml"), 3, 64, 64)


def of_monai(name, *arguments, **options):
    from monai.networks import nets

    return getattr(nets, name)(*arguments, **options)


plane, space = ({"spatial_dims": dims, "in_channels": 1, "out_channels": 2} for dims in (2, 3))
for name, options in [
    ("UNet", space | {"channels": (4, 8, 8), "strides": (2, 2), "num_res_units": 1, "norm": "batch"}),
    ("SegResNet", plane | {"init_filters": 8, "norm": "batch", "blocks_down": (1, 1), "blocks_up": (1,)}),
    ("DynUNet", plane | {"kernel_size": [3] * 3, "strides": [1, 2, 2], "upsample_kernel_size": [2, 2],
                         "filters": [4, 8, 8], "norm_name": "batch", "deep_supervision": True, "deep_supr_num": 1}),
    ("DenseNet121", plane | {"init_features": 8, "growth_rate": 4, "block_config": (2, 2)}),
]:  # fmt: skip
    shape = (1, *[16] * options["spatial_dims"])
    add(f"monai {name}", partial(of_monai, name, **options), *shape)


def of_transformers(name, config=None, **options):
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config or f"{name[:-5]}Config")(**options))


def conformer():
    rates = ("activation_dropout", "attention_dropout", "conformer_conv_dropout", "feat_proj_dropout",
             "hidden_dropout", "layerdrop", "mask_time_prob")  # fmt: skip
    return of_transformers(
        "Wav2Vec2ConformerModel", hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=16,
        conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 4), num_conv_pos_embedding_groups=2,
        **dict.fromkeys(rates, 0.0),
    )  # fmt: skip


def rt_detr():
    """Its backbone's layers are frozen, those of its encoder are not."""
    from transformers import RTDetrResNetConfig

    backbone = RTDetrResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1] * 4,
                                  layer_type="basic", out_features=["stage2", "stage3", "stage4"])  # fmt: skip
    return of_transformers(
        "RTDetrModel", backbone_config=backbone, encoder_hidden_dim=16, encoder_in_channels=[16] * 3, d_model=16,
        encoder_ffn_dim=16, decoder_ffn_dim=16, decoder_in_channels=[16] * 3, num_queries=5, num_denoising=0,
        encoder_attention_heads=2, decoder_attention_heads=2, decoder_layers=1,
    )  # fmt: skip


stages = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
for name, options, side in [
    ("ResNetModel", stages | {"layer_type": "basic"}, 32),
    ("RegNetModel", stages | {"groups_width": 8}, 32),
    ("MobileNetV2Model", {"depth_multiplier": 0.35, "image_size": 64, "tf_padding": False}, 64),
    ("LevitModel", {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 2, 2],
                    "depths": [1] * 3, "key_dim": [8] * 3, "drop_path_rate": 0}, 64),
    ("SegformerForSemanticSegmentation", {"config": "SegformerConfig", "hidden_sizes": [8] * 4, "depths": [1] * 4,
                                          "num_attention_heads": [1] * 4, "decoder_hidden_size": 8,
                                          "drop_path_rate": 0}, 64),
]:  # fmt: skip
    add(f"transformers {name}", partial(of_transformers, name, **options), 3, side, side)
add("transformers Wav2Vec2ConformerModel", conformer, 400)
add("transformers RTDetrModel", rt_detr, 3, 64, 64)


def gnn(name, **options):
    from torch_geometric.nn import models

    return getattr(models, name)(8, 16, 3, 4, norm="batch_norm", **options), graphs()


def crystal():
    from torch_geometric.nn import BatchNorm, CGConv, Sequential

    steps = [(CGConv(8, dim=4, batch_norm=True), "x, edges, features -> x"), (BatchNorm(8), "x -> x"), nn.ReLU()]
    return Sequential("x, edges, features", [*steps, nn.Linear(8, 4)]), graphs(num_edge_features=4)


for name in ["GCN", "GIN", "GraphSAGE"]:
    add(f"torch_geometric {name}", partial(gnn, name))
add("torch_geometric CGConv", crystal)


def of_lightly(projection, *prediction):
    from lightly.models.modules import heads

    made = [getattr(heads, projection)(8, 16, 8)]
    return nn.Sequential(nn.Linear(6, 8), *made, *(getattr(heads, name)(8, 16, 8) for name in prediction))


for method, *names in [
    ("BYOL", "BYOLProjectionHead", "BYOLPredictionHead"),
    ("SimCLR", "SimCLRProjectionHead"),
    ("SimSiam", "SimSiamProjectionHead", "SimSiamPredictionHead"),
    ("BarlowTwins", "BarlowTwinsProjectionHead"),
]:
    add(f"lightly {method}", partial(of_lightly, *names), 6)
