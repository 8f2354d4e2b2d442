"""ARM classifiers in timm: `import arm_cuda.timm`, then `timm.create_model("arm_base_patch16_224", ...)`.

Weights come from `pretrained_cfg_overlay={"file": PATH}` (any source of `arm_vision.load_model`), or for
the tag `official_in1k` from the official repository on the Hugging Face hub.
"""

from __future__ import annotations

from typing import Any

from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
)

from arm_core.data.model_config import ModelConfig
from arm_core.engine.modules import POOLINGS
from arm_core.model.parameters import initial_parameters
from arm_core.model.presets import classifier_preset
from arm_core.model.spec import EncoderSpec
from arm_cuda.library import ArmClassifier, create_module

OFFICIAL = "official"
"""Prefix of the official checkpoints' published names."""

SIZES = {"base": ("base", "arm_b"), "large": ("large", "arm_l"), "huge": ("huge", "arm_h")}
"""Sizes with official weights, and the parts of file names that identify them."""


def _cfg(size: int = 224, **changes: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "interpolation": "bicubic",
        "crop_pct": 0.875 if size <= 224 else 1.0,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed",
        "classifier": "head",
        "paper_ids": "arXiv:2406.07537",
        "paper_name": "Autoregressive Pretraining with Mamba in Vision",
        "origin_url": "https://github.com/OliverRensu/ARM",
        **changes,
    }


default_cfgs = generate_default_cfgs(
    {
        "arm_tiny_patch16_224.untrained": _cfg(),
        "arm_small_patch16_224.untrained": _cfg(),
        "arm_base_patch16_224.official_in1k": _cfg(hf_hub_id="OliverRen/ARM"),
        "arm_large_patch16_224.official_in1k": _cfg(hf_hub_id="OliverRen/ARM"),
        "arm_huge_patch16_224.official_in1k": _cfg(hf_hub_id="OliverRen/ARM"),
        "arm_huge_patch16_384.official_in1k": _cfg(384, hf_hub_id="OliverRen/ARM"),
    }
)


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> Any:
    """Create one of the models. kwargs: timm's num_classes, global_pool, img_size, in_chans, drop_path_rate,
    dynamic_img_size, features_only and out_indices, and `scan`."""
    size, image_size = variant.split("_")[1], int(variant.rpartition("_")[2])

    def build(**options: Any) -> ArmClassifier:
        return _classifier(size, image_size, source, **options)

    overlay = {**_plain(kwargs.get("pretrained_cfg")), **(kwargs.get("pretrained_cfg_overlay") or {})}
    source = _source(variant, size, overlay) if pretrained else None
    return build_model_with_cfg(
        build,
        variant,
        False,  # `build` loads the weights, since it reads all formats
        feature_cfg={"out_indices": kwargs.pop("out_indices", (2, 5, 8, 11)), "feature_cls": "getter"},
        **kwargs,
    )


def _classifier(
    size: str,
    image_size: int,
    source: str | None,
    *,
    num_classes: int = 1000,
    global_pool: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    dynamic_img_size: bool = False,
    scan: str = "auto",
) -> ArmClassifier:
    if global_pool is not None and global_pool not in POOLINGS:
        raise ValueError(f"global_pool: expected {', '.join(POOLINGS)}, found {global_pool!r}")
    pixels = img_size or image_size
    wanted = (pixels, pixels) if isinstance(pixels, int) else (pixels[0], pixels[1])
    options: dict[str, Any] = {
        "drop_path_rate": drop_path_rate,
        "dynamic_image_size": dynamic_img_size,
        "scan": scan,
    }
    if source is not None:
        from arm_vision import load_model

        model: ArmClassifier = load_model(source, "torch", image_size=wanted, **options)
        if model.spec.encoder.channels != in_chans:
            raise ValueError(f"in_chans: the weights have {model.spec.encoder.channels}, found {in_chans}")
        if num_classes != model.num_classes:
            model.reset_classifier(num_classes)
        if global_pool is not None:
            model.set_pooling(POOLINGS[global_pool])
        return model.train()
    spec = classifier_preset(
        size, classes=num_classes or 1, image_size=wanted, pooling=POOLINGS[global_pool or "avg"]
    )
    if in_chans != spec.encoder.channels:
        encoder = EncoderSpec(width=spec.encoder.width, depth=spec.encoder.depth, channels=in_chans)
        spec = classifier_preset(
            size, classes=num_classes or 1, image_size=wanted, pooling=spec.pooling, encoder=encoder
        )
    created = create_module(spec, initial_parameters(spec, 0), ModelConfig(), **options)
    assert isinstance(created, ArmClassifier)
    if num_classes == 0:
        created.reset_classifier(0)
    return created.train()


def _plain(cfg: Any) -> dict[str, Any]:
    if cfg is None or isinstance(cfg, str):
        return {}
    return dict(cfg) if isinstance(cfg, dict) else dict(cfg.to_dict())


def _source(variant: str, size: str, cfg: dict[str, Any]) -> str:
    """The file with the weights of a variant; ValueError unless exactly one file fits."""
    if cfg.get("file"):
        return str(cfg["file"])
    if cfg.get("hf_hub_id") and cfg.get("hf_hub_filename"):
        return f"hf://{cfg['hf_hub_id']}/{cfg['hf_hub_filename']}"
    from arm_vision import list_models

    if size not in SIZES:
        raise ValueError(f"{variant}: no published weights; pass pretrained_cfg_overlay={{'file': PATH}}")
    names = [p.name for p in list_models() if p.name.startswith(f"{OFFICIAL}/")]
    fitting = [
        n for n in names if any(part in n.lower() for part in SIZES[size]) and "pretrain" not in n.lower()
    ]
    if len(fitting) != 1:
        raise ValueError(
            f"{variant}: expected one official checkpoint of this size, found {', '.join(fitting) or 'none'} "
            f"among {', '.join(names) or 'no files'}; pass pretrained_cfg_overlay={{'hf_hub_filename': FILE}}"
        )
    return fitting[0]


@register_model
def arm_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Any:
    """ARM-Ti: width 192, depth 12, for development; there are no published weights."""
    return _create("arm_tiny_patch16_224", pretrained, **kwargs)


@register_model
def arm_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Any:
    """ARM-S: width 384, depth 12, for development; there are no published weights."""
    return _create("arm_small_patch16_224", pretrained, **kwargs)


@register_model
def arm_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Any:
    """ARM-B: width 768, depth 12."""
    return _create("arm_base_patch16_224", pretrained, **kwargs)


@register_model
def arm_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> Any:
    """ARM-L: width 1024, depth 24."""
    return _create("arm_large_patch16_224", pretrained, **kwargs)


@register_model
def arm_huge_patch16_224(pretrained: bool = False, **kwargs: Any) -> Any:
    """ARM-H: width 1536, depth 24."""
    return _create("arm_huge_patch16_224", pretrained, **kwargs)


@register_model
def arm_huge_patch16_384(pretrained: bool = False, **kwargs: Any) -> Any:
    """ARM-H for images of 384x384 pixels."""
    return _create("arm_huge_patch16_384", pretrained, **kwargs)
