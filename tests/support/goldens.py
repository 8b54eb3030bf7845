"""Read golden vectors of the official repositories, and build models with their weights and configurations.

A folder of goldens holds `NAME.json` (the manifest) and `NAME.npz` (the arrays) for each variant, and `inputs.npz`. The
folder is tests/golden, unless the environment variable RAYDETR_GOLDEN names another.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detrs.denoising import Draws
from detrs.official_names import official_names
from detrs.structures import Images, Targets
from detrs.zoo import (
    BackboneConfig,
    ConditionalDetrConfig,
    DabDetrConfig,
    DeformableDetrConfig,
    DetrConfig,
    DinoConfig,
    LossConfig,
    Model,
    ModelConfig,
    build,
)

FOLDER = Path(os.environ.get("RAYDETR_GOLDEN") or Path(__file__).parents[1] / "golden")


ARCHITECTURES = {
    "detr": "detr",
    "ConditionalDETR": "conditional_detr",
    "DAB-DETR": "dab_detr",
    "Deformable-DETR": "deformable_detr",
    "DINO": "dino",
}


@dataclass(frozen=True)
class Golden:
    """One golden: settings and results of a run of the official code."""

    manifest: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def architecture(self) -> str:
        return architecture_of(self.manifest)

    def tensor(self, name: str, dtype: torch.dtype = torch.float64) -> Tensor:
        value = torch.from_numpy(self.arrays[name])
        return value.to(dtype) if value.is_floating_point() else value


def architecture_of(manifest: dict[str, Any]) -> str:
    """Return our architecture of an official run; two models of the repository of DAB-DETR have different ones."""
    if manifest.get("args", {}).get("modelname") == "dab_deformable_detr":
        return "deformable_detr"
    return ARCHITECTURES[(manifest.get("official_repo") or manifest["repo"]).split("/")[1]]


def names(kind: str) -> list[str]:
    """Return the names of the goldens of a kind: model, edge, full or traj."""
    found = []
    for path in sorted(FOLDER.glob("*.json")):
        prefix = path.stem.split("_")[0]
        is_model = "grad_names" in path.read_text() and path.with_suffix(".npz").exists()
        if (kind == "model" and is_model) or (kind != "model" and prefix == kind):
            found.append(path.stem)
    return found


def read(name: str) -> Golden:
    manifest = json.loads((FOLDER / f"{name}.json").read_text())
    arrays = FOLDER / f"{name}.npz"
    return Golden(manifest, dict(np.load(arrays)) if arrays.exists() else {})


def config_of(args: dict[str, Any], architecture: str, options: dict[str, Any] | None = None) -> ModelConfig:
    """Return the configuration that corresponds to the arguments of an official run."""
    readers = {
        "detr": _detr,
        "conditional_detr": _conditional,
        "dab_detr": _dab,
        "deformable_detr": _deformable,
        "dino": _dino,
    }
    return readers[architecture](args, options or {})


def _shared(args: dict[str, Any]) -> dict[str, Any]:
    num_frozen_stages = 2 if args["lr_backbone"] > 0 else 5
    return {
        "backbone": BackboneConfig(
            args["backbone"], num_frozen_stages=num_frozen_stages, dilation=args["dilation"]
        ),
        "hidden_dim": args["hidden_dim"],
        "num_heads": args["nheads"],
        "num_encoder_layers": args["enc_layers"],
        "num_decoder_layers": args["dec_layers"],
        "ffn_dim": args["dim_feedforward"],
        "dropout": float(args["dropout"]),
        "num_queries": args["num_queries"],
        "aux_loss": args["aux_loss"],
    }


def _loss(args: dict[str, Any]) -> LossConfig:
    return LossConfig(
        class_weight=float(args["cls_loss_coef"]),
        box_weight=float(args["bbox_loss_coef"]),
        giou_weight=float(args["giou_loss_coef"]),
        class_cost=float(args["set_cost_class"]),
        box_cost=float(args["set_cost_bbox"]),
        giou_cost=float(args["set_cost_giou"]),
        alpha=float(args["focal_alpha"]),
    )


def _dense(args: dict[str, Any]) -> dict[str, Any]:
    kinds = {"v2": "sine", "sine": "sine", "v3": "learned", "learned": "learned"}
    num_classes = {"coco": 91, "coco_panoptic": 250}.get(args["dataset_file"], 20)
    return {
        "num_classes": num_classes,
        "position_encoding": kinds[args["position_embedding"]],
        **_shared(args),
    }


def _detr(args: dict[str, Any], options: dict[str, Any]) -> DetrConfig:
    if "focal_alpha" in args:  # DETR-DC5+; the official repository of DETR has no focal loss
        loss = _loss(args)
    else:
        loss = _loss({"cls_loss_coef": 1.0, "focal_alpha": 0.25} | args)
        loss = dataclasses.replace(loss, kind="cross_entropy", no_object_weight=float(args["eos_coef"]))
    activation = options.get("activation", "relu")
    return DetrConfig(activation=activation, pre_norm=args["pre_norm"], loss=loss, **_dense(args))


def _conditional(args: dict[str, Any], options: dict[str, Any]) -> ConditionalDetrConfig:
    activation = options.get("activation", "relu")
    return ConditionalDetrConfig(activation=activation, loss=_loss(args), **_dense(args))


def _dab(args: dict[str, Any], options: dict[str, Any]) -> DabDetrConfig:
    options = args | options  # some are arguments of the constructors only
    scales = {"cond_elewise": "elementwise", "cond_scalar": "scalar", "fix_elewise": "learned"}
    temperatures: dict[str, Any] = {}
    if args["position_embedding"] in ("v2", "sine"):
        x, y = float(args["pe_temperatureW"]), float(args["pe_temperatureH"])
        temperatures = {"position_temperature": x, "position_temperature_y": None if x == y else y}
    return DabDetrConfig(
        activation=args["transformer_activation"],
        encoder_norm=args["pre_norm"],
        decoder_self_attention=not options.get("rm_self_attn_decoder", False),
        num_patterns=args["num_patterns"],
        anchor="point" if options.get("query_dim", 4) == 2 else "box",
        random_points=args["random_refpoints_xy"],
        refinement=options.get("iter_update", True),
        modulate_attention=options.get("modulate_hw_attn", True),
        position_scale=scales[options.get("query_scale_type", "cond_elewise")],
        keep_query_position=options.get("keep_query_pos", False),
        shared_box_heads=not options.get("bbox_embed_diff_each_layer", False),
        num_select=args["num_select"],
        loss=_loss(args),
        **temperatures,
        **_dense(args),
    )


def _deformable(args: dict[str, Any], options: dict[str, Any]) -> DeformableDetrConfig:
    single = args["num_feature_levels"] == 1
    anchors: dict[str, Any] = {}
    if args.get("modelname") == "dab_deformable_detr":  # refinement is no argument, but a default
        settings = {"with_box_refine": True} | args | options
        args = settings
        anchors = {
            "anchors": True,
            "num_patterns": settings["num_patterns"],
            "random_points": settings["random_refpoints_xy"],
        }
    return DeformableDetrConfig(
        **anchors,
        num_classes=91,
        strides=(32,) if single else (8, 16, 32),
        num_feature_levels=args["num_feature_levels"],
        refinement=args["with_box_refine"],
        two_stage=args["two_stage"],
        num_points=args["dec_n_points"],
        num_encoder_points=args["enc_n_points"],
        loss=_loss(args),
        **_shared(args),
    )


def _dino(args: dict[str, Any], options: dict[str, Any]) -> DinoConfig:
    x, y = float(args["pe_temperatureW"]), float(args["pe_temperatureH"])
    two_stage = args["two_stage_type"] == "standard"
    return DinoConfig(
        num_classes=args["num_classes"],
        strides=tuple(4 * 2**index for index in args["return_interm_indices"]),
        num_feature_levels=args["num_feature_levels"],
        position_temperature=x,
        position_temperature_y=None if x == y else y,
        num_points=args["dec_n_points"],
        num_encoder_points=args["enc_n_points"],
        # The official code does not use two_stage_default_hw: the proposals have its default, 0.05
        two_stage=two_stage,
        mixed_selection=args["embed_init_tgt"] or not two_stage,
        encoder_shares_class_head=two_stage and args["two_stage_class_embed_share"],
        encoder_shares_box_head=two_stage and args["two_stage_bbox_embed_share"],
        shared_class_heads=args["dec_pred_class_embed_share"],
        shared_box_heads=args["dec_pred_bbox_embed_share"],
        look_forward_twice=not args["use_detached_boxes_dec_out"],
        num_denoising=args["dn_number"] if args["use_dn"] else 0,
        label_noise=float(args["dn_label_noise_ratio"]),
        box_noise=float(args["dn_box_noise_scale"]),
        num_select=args["num_select"],
        loss=_loss(args),
        **_shared(args),
    )


def without_effect(config: ModelConfig) -> set[str]:
    """Return the official parameters that have no effect in such a model, and that ours does not have."""
    if isinstance(config, DinoConfig) and config.num_denoising == 0:
        return {"label_enc.weight"}
    return set()


def build_filled(config: ModelConfig, dtype: torch.dtype) -> Model:
    """Build a model with the weights of the goldens."""
    model = build(config)
    detector = model.detector
    with torch.no_grad():
        state = detector.state_dict()
        for ours, official in official_names(config, state).items():
            state[ours].copy_(rule_weight(official[0], tuple(state[ours].shape)))
    detector.to(dtype)
    return model


def build_edge(golden: Golden, case: dict[str, Any]) -> Model:
    """Build a model for an edge case. Only its criterion and postprocessing are used: the rest is tiny."""
    weights, costs = golden.manifest["weight_dict"], golden.manifest["matcher"]
    loss = LossConfig(
        kind="cross_entropy" if golden.architecture == "detr" else "focal",
        class_weight=float(weights["loss_ce"]),
        box_weight=float(weights["loss_bbox"]),
        giou_weight=float(weights["loss_giou"]),
        class_cost=float(costs["set_cost_class"]),
        box_cost=float(costs["set_cost_bbox"]),
        giou_cost=float(costs["set_cost_giou"]),
        alpha=float(golden.manifest.get("focal_alpha", 0.25)),
    )
    tiny: dict[str, Any] = {
        "num_classes": golden.manifest["num_logit_columns"] - (golden.architecture == "detr"),
        "backbone": BackboneConfig("small", "batch", 0),
        "hidden_dim": 8,
        "num_heads": 2,
        "num_encoder_layers": 1,
        "num_decoder_layers": 2,
        "loss": loss,
    }
    if golden.architecture == "detr":
        return build(DetrConfig(**tiny))
    configs = {
        "conditional_detr": ConditionalDetrConfig,
        "dab_detr": DabDetrConfig,
        "deformable_detr": DeformableDetrConfig,
        "dino": DinoConfig,
    }
    num_select = golden.arrays[f"{case['name']}/post_scores"].shape[1]
    return build(configs[golden.architecture](num_select=num_select, **tiny))


@functools.lru_cache(maxsize=1000)
def rule_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the value of the official parameter `name`, by the rule in the README of the goldens."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    last = name.split(".")[-1]
    if last == "running_var":
        return torch.from_numpy(generator.uniform(0.5, 1.5, shape)).float()
    z = generator.standard_normal(shape)
    fan_in = np.sqrt(np.prod(shape[1:]))
    if last == "running_mean":
        z = 0.1 * z
    elif len(shape) == 1 and last == "weight":
        z = 0.25 * (1 + 0.1 * z) if name.endswith("activation.weight") else 1 + 0.1 * z
    elif len(shape) <= 1:
        z = 0.1 * z
    elif name.endswith("sampling_offsets.weight"):
        z = z / fan_in * 0.5
    else:
        z = z / fan_in
    return torch.from_numpy(np.asarray(z)).float()


def inputs(manifest: dict[str, Any], dtype: torch.dtype) -> tuple[Images, Targets, Tensor]:
    """Return the batch of a model golden, and the original sizes."""
    arrays = dict(np.load(FOLDER / manifest["inputs"]["file"]))
    pixels = [
        torch.from_numpy(arrays[f"image{i}"]).to(dtype) for i in range(len(manifest["inputs"]["n_targets"]))
    ]
    targets = packed_targets(arrays, len(pixels), dtype)
    return collate(pixels), targets, torch.from_numpy(arrays["orig_sizes_hw"])


def packed_targets(
    arrays: dict[str, np.ndarray], num_images: int, dtype: torch.dtype, prefix: str = ""
) -> Targets:
    labels = [torch.from_numpy(arrays[f"{prefix}target{i}_labels"]) for i in range(num_images)]
    boxes = [torch.from_numpy(arrays[f"{prefix}target{i}_boxes"]).to(dtype) for i in range(num_images)]
    return Targets(torch.cat(labels), torch.cat(boxes), tuple(len(x) for x in labels))


def collate(pixels: list[Tensor]) -> Images:
    height, width = (max(x.shape[side] for x in pixels) for side in (1, 2))
    batch = pixels[0].new_zeros(len(pixels), 3, height, width)
    padding = torch.ones(len(pixels), height, width, dtype=torch.bool)
    for i, image in enumerate(pixels):
        batch[i, :, : image.shape[1], : image.shape[2]] = image
        padding[i, : image.shape[1], : image.shape[2]] = False
    return Images(batch, padding)


def draws(golden: Golden, prefix: str = "dn_") -> Draws | None:
    """Return the random numbers of denoising, or None for a golden without denoising.

    Noise that is off has no random numbers: zeros replace them.
    """
    found = [golden.tensor(name, torch.float32) for name in sorted(golden.arrays) if f"{prefix}draw" in name]
    if not found:
        return None
    flat, wide = [x for x in found if x.dim() == 1], [x for x in found if x.dim() == 2]
    num_rows = len(found[0])
    label_chance, new_labels = flat or (torch.ones(num_rows), torch.zeros(0, dtype=torch.int64))
    signs, fractions = wide or (torch.zeros(num_rows, 4), torch.zeros(num_rows, 4))
    return Draws(label_chance, new_labels, signs, fractions)
