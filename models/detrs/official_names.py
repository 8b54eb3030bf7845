"""Convert state dicts from and to the names of the official repositories.

A rule maps a pattern of our names to the official names of the same tensor. An official state dict holds a shared
tensor under several names, whose values must agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from detrs.zoo import (
    ConditionalDetrConfig,
    DabDetrConfig,
    DeformableDetrConfig,
    DetrConfig,
    DinoConfig,
    ModelConfig,
)

Rules = dict[str, tuple[str, ...]]  # {0}, {1}: the pattern's groups

_ENCODER, _DECODER = "transformer.encoder.layers.{0}", "transformer.decoder.layers.{0}"

_COMMON: Rules = {
    r"backbone\.(.*)": ("backbone.0.body.{0}",),
    r"encoder\.layers\.(\d+)\.feed_forward\.(.*)": (_ENCODER + ".{1}",),
    r"encoder\.layers\.(\d+)\.(norm\d\..*)": (_ENCODER + ".{1}",),
    r"decoder\.layers\.(\d+)\.feed_forward\.(.*)": (_DECODER + ".{1}",),
    r"decoder\.norm\.(.*)": ("transformer.decoder.norm.{0}",),
}

_DENSE: Rules = _COMMON | {
    r"neck\.projections\.0\.(.*)": ("input_proj.{0}",),
    r"neck\.position\.rows\.(.*)": ("backbone.1.row_embed.{0}",),
    r"neck\.position\.columns\.(.*)": ("backbone.1.col_embed.{0}",),
    r"encoder\.layers\.(\d+)\.attention\.in_proj\.(.*)": (_ENCODER + ".self_attn.in_proj_{1}",),
    r"encoder\.layers\.(\d+)\.attention\.out_proj\.(.*)": (_ENCODER + ".self_attn.out_proj.{1}",),
    r"encoder\.norm\.(.*)": ("transformer.encoder.norm.{0}",),
    r"decoder\.layers\.(\d+)\.(norm\d\..*)": (_DECODER + ".{1}",),
    r"decoder\.class_heads\.0\.(.*)": ("class_embed.{0}",),
    r"queries\.embed\.weight": ("query_embed.weight",),
}

_DETR: Rules = _DENSE | {
    r"decoder\.layers\.(\d+)\.self_attention\.in_proj\.(.*)": (_DECODER + ".self_attn.in_proj_{1}",),
    r"decoder\.layers\.(\d+)\.self_attention\.out_proj\.(.*)": (_DECODER + ".self_attn.out_proj.{1}",),
    r"decoder\.layers\.(\d+)\.cross_attention\.in_proj\.(.*)": (_DECODER + ".multihead_attn.in_proj_{1}",),
    r"decoder\.layers\.(\d+)\.cross_attention\.out_proj\.(.*)": (_DECODER + ".multihead_attn.out_proj.{1}",),
    r"decoder\.box_heads\.0\.(.*)": ("bbox_embed.{0}",),
}

_CONDITIONAL_ATTENTION = {
    "self_attention": ("sa", {"content_query": "qcontent", "content_key": "kcontent", "pos_query": "qpos",
                              "pos_key": "kpos", "value": "v"}),
    "cross_attention": ("ca", {"content_query": "qcontent", "content_key": "kcontent", "pos_query": "qpos",
                               "pos_key": "kpos", "value": "v", "spatial_query": "qpos_sine"}),
}  # fmt: skip

_CONDITIONAL_FAMILY: Rules = (
    _DENSE
    | {
        rf"decoder\.layers\.(\d+)\.{attention}\.{ours}\.(.*)": (f"{_DECODER}.{prefix}_{official}_proj.{{1}}",)
        for attention, (prefix, projections) in _CONDITIONAL_ATTENTION.items()
        for ours, official in projections.items()
    }
    | {
        r"decoder\.layers\.(\d+)\.self_attention\.out_proj\.(.*)": (_DECODER + ".self_attn.out_proj.{1}",),
        r"decoder\.layers\.(\d+)\.cross_attention\.out_proj\.(.*)": (_DECODER + ".cross_attn.out_proj.{1}",),
        r"decoder\.query_position\.scale\.(.*)": ("transformer.decoder.query_scale.{0}",),
    }
)

_CONDITIONAL: Rules = _CONDITIONAL_FAMILY | {
    r"queries\.point\.(.*)": ("transformer.decoder.ref_point_head.{0}",),
    # A name of our own: only the paper has learned points
    r"queries\.points\.(.*)": ("transformer.decoder.ref_points.{0}",),
    r"decoder\.box_heads\.0\.(.*)": ("bbox_embed.{0}",),
}

_ANCHORS = "refpoint_embed.weight"  # boxes; with fixed centers, two of our tensors are its halves
_HALVES = (f"{_ANCHORS}[:, :2]", f"{_ANCHORS}[:, 2:]")
_FIXED_POINTS: Rules = {r"queries\.points": _HALVES[:1], r"queries\.anchors\.weight": _HALVES[1:]}

_DAB: Rules = _CONDITIONAL_FAMILY | {
    r"encoder\.position_scale\.(.*)": ("transformer.encoder.query_scale.{0}",),
    r"queries\.anchors\.weight": (_ANCHORS,),
    r"queries\.patterns\.weight": ("transformer.patterns.weight",),
    r"decoder\.query_position\.embed\.(.*)": ("transformer.decoder.ref_point_head.{0}",),
    r"decoder\.query_position\.sides\.(.*)": ("transformer.decoder.ref_anchor_head.{0}",),
}

_MULTI_SCALE: Rules = _COMMON | {
    r"neck\.projections\.(.*)": ("input_proj.{0}",),
    r"neck\.level_embed": ("transformer.level_embed",),
    r"encoder\.layers\.(\d+)\.attention\.(.*)": (_ENCODER + ".self_attn.{1}",),
    r"decoder\.layers\.(\d+)\.self_attention\.in_proj\.(.*)": (_DECODER + ".self_attn.in_proj_{1}",),
    r"decoder\.layers\.(\d+)\.self_attention\.out_proj\.(.*)": (_DECODER + ".self_attn.out_proj.{1}",),
    r"decoder\.layers\.(\d+)\.cross_attention\.(.*)": (_DECODER + ".cross_attn.{1}",),
    # The official code numbers the norms of a decoder layer in another order
    r"decoder\.layers\.(\d+)\.norm1\.(.*)": (_DECODER + ".norm2.{1}",),
    r"decoder\.layers\.(\d+)\.norm2\.(.*)": (_DECODER + ".norm1.{1}",),
    r"decoder\.layers\.(\d+)\.norm3\.(.*)": (_DECODER + ".norm3.{1}",),
    r"queries\.proposals\.project\.(.*)": ("transformer.enc_output.{0}",),
    r"queries\.proposals\.norm\.(.*)": ("transformer.enc_output_norm.{0}",),
}

_DEFORMABLE: Rules = _MULTI_SCALE | {
    r"queries\.embed\.weight": ("query_embed.weight",),
    r"queries\.point\.(.*)": ("transformer.reference_points.{0}",),
    r"queries\.project\.(.*)": ("transformer.pos_trans.{0}",),
    r"queries\.norm\.(.*)": ("transformer.pos_trans_norm.{0}",),
    # DAB-Deformable-DETR
    r"queries\.content\.weight": ("tgt_embed.weight",),
    r"queries\.anchors\.weight": ("refpoint_embed.weight",),
    r"queries\.patterns\.weight": ("patterns_embed.weight",),
    r"decoder\.query_position\.embed\.(.*)": ("transformer.decoder.ref_point_head.{0}",),
    r"decoder\.query_position\.scale\.(.*)": ("transformer.decoder.query_scale.{0}",),
}

_DINO: Rules = _MULTI_SCALE | {
    r"queries\.content\.weight": ("transformer.tgt_embed.weight",),
    r"queries\.anchors\.weight": ("transformer.refpoint_embed.weight",),
    r"decoder\.query_position\.embed\.(.*)": ("transformer.decoder.ref_point_head.{0}",),
    r"denoising\.label_embed\.weight": ("label_enc.weight",),
}


# A checkpoint belongs to the first architecture of which it has a parameter: the order matters
_SIGNATURES = {
    "dino": ("transformer.enc_out_class_embed.weight", "transformer.refpoint_embed.weight"),
    "deformable_detr": ("transformer.level_embed",),
    "dab_detr": ("refpoint_embed.weight",),
    "conditional_detr": ("transformer.decoder.query_scale.layers.0.weight",),
    "detr": ("transformer.decoder.layers.0.multihead_attn.in_proj_weight",),
}

# Of the official DINO, also where it has no effect, without denoising
_LABEL_EMBED = "label_enc.weight"

# Our names of the tensors whose size depends on the number of classes
CLASS_DEPENDENT = re.compile(
    r"(decoder\.class_heads|queries\.proposals\.class_head|denoising\.label_embed)\..*"
)


def recognize_architecture(official: Iterable[str]) -> str | None:
    """Return the architecture that these official parameter names belong to, or None."""
    names = set(official)
    return next((kind for kind, signature in _SIGNATURES.items() if names & set(signature)), None)


def rules(config: ModelConfig) -> Rules:
    """Return the rules of a model; a shared head has one official name per layer."""
    match config:
        case DetrConfig():
            return _DETR
        case ConditionalDetrConfig():
            return _CONDITIONAL
        case DabDetrConfig():
            pattern = (
                r"decoder\.box_heads\.0\.(.*)" if config.shared_box_heads else r"decoder\.box_heads\.(.*)"
            )
            # Only refinement needs the box heads inside the decoder
            modules = ("", "transformer.decoder.") if config.refinement else ("",)
            box_heads = {pattern: tuple(f"{module}bbox_embed.{{0}}" for module in modules)}
            return _DAB | box_heads | (_FIXED_POINTS if config.fixed_points else {})
        case DinoConfig():
            return _DINO | _dino_heads(config)
        case DeformableDetrConfig():
            return _DEFORMABLE | _deformable_heads(config)


def official_names(config: ModelConfig, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the official names of each of our names, in alphabetical order."""
    table = [(re.compile(pattern), templates) for pattern, templates in rules(config).items()]
    found = {}
    for name in names:
        matches = [(m, templates) for pattern, templates in table if (m := pattern.fullmatch(name))]
        assert len(matches) == 1, f"{name} has {len(matches)} rules"
        (match, templates) = matches[0]
        found[name] = tuple(sorted(template.format(*match.groups()) for template in templates))
    return found


def to_official(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert to an official state dict, with shared tensors under all their names.

    Parts of one official tensor are joined. A DINO without denoising gets the label embedding that the official model
    has nevertheless, of zeros.
    """
    names = official_names(config, state)
    converted = {name: state[ours] for ours in state for name in names[ours]}
    if _HALVES[0] in converted:
        converted[_ANCHORS] = torch.cat([converted.pop(half) for half in _HALVES], dim=1)
    if not _uses_label_embed(config):
        classes = state["decoder.class_heads.0.weight"]
        converted[_LABEL_EMBED] = classes.new_zeros(classes.shape[0] + 1, classes.shape[1])
    return converted


def from_official(
    config: ModelConfig, official: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Convert from an official state dict; `own` is the state dict of the model, for names and shapes.

    The label embedding of DINO is omitted for a model without denoising.

    Raises:
        ValueError: names are missing or unexpected, shapes differ, weights are integers, or the values under the names
            of one tensor differ.
    """
    names = official_names(config, own)
    expected = {name: ours for ours, group in names.items() for name in group}
    if _HALVES[0] in expected and _ANCHORS in official:
        points, sides = official[_ANCHORS][..., :2], official[_ANCHORS][..., 2:]
        official = {**official, _HALVES[0]: points, _HALVES[1]: sides}
        del official[_ANCHORS]
    if not _uses_label_embed(config):
        official = {name: value for name, value in official.items() if name != _LABEL_EMBED}
    missing, unexpected = sorted(expected.keys() - official.keys()), sorted(official.keys() - expected.keys())
    common = expected.keys() & official.keys()
    shapes = sorted(name for name in common if official[name].shape != own[expected[name]].shape)
    if missing or unexpected or shapes:
        raise ValueError(
            f"not a checkpoint of this {config.architecture} model: missing {_some(missing)}; "
            f"unexpected {_some(unexpected)}; other shape {_some(shapes)}"
        )
    integers = sorted(
        name
        for name in common
        if own[expected[name]].is_floating_point() and not official[name].is_floating_point()
    )
    if integers:
        raise ValueError(
            f"integers in place of fractions: {_some(integers)}: save the weights as float32, not quantized"
        )
    for ours, group in names.items():
        for other in group[1:]:
            if not torch.equal(official[group[0]], official[other]):
                raise ValueError(f"{group[0]} and {other} are one tensor ({ours}), but their values differ")
    return {ours: official[group[0]] for ours, group in names.items()}


def _uses_label_embed(config: ModelConfig) -> bool:
    return not isinstance(config, DinoConfig) or config.num_denoising > 0


def _dino_heads(config: DinoConfig) -> Rules:
    layers, heads = range(config.num_decoder_layers), Rules()
    for kind, official, shared, encoder_shares in (
        ("class", "class_embed", config.shared_class_heads, config.encoder_shares_class_head),
        ("box", "bbox_embed", config.shared_box_heads, config.encoder_shares_box_head),
    ):
        prefixes, encoder = (official, f"transformer.decoder.{official}"), f"transformer.enc_out_{official}"
        heads |= _heads(kind, prefixes, layers if shared else None, (encoder,), encoder_shares=encoder_shares)
    return heads


def _deformable_heads(config: DeformableDetrConfig) -> Rules:
    layers, heads = range(config.num_decoder_layers), Rules()
    for kind, official, in_decoder in (
        ("class", "class_embed", config.two_stage),
        ("box", "bbox_embed", config.refinement),
    ):
        prefixes = (official, f"transformer.decoder.{official}") if in_decoder else (official,)
        # The heads of the encoder follow those of the decoder layers
        encoder = tuple(f"{prefix}.{len(layers)}" for prefix in prefixes) if config.two_stage else ()
        shared_by = None if config.refinement else layers
        heads |= _heads(kind, prefixes, shared_by, encoder, encoder_shares=not config.refinement)
    return heads


def _heads(
    kind: str,
    prefixes: tuple[str, ...],
    shared_by: range | None,
    encoder: tuple[str, ...],
    *,
    encoder_shares: bool,
) -> Rules:
    """Return the rules of the heads of decoder and encoder; a head of both has all names under both of ours."""
    first_stage = rf"queries\.proposals\.{kind}_head\.(.*)"
    if shared_by is None:
        layered = {
            rf"decoder\.{kind}_heads\.(\d+)\.(.*)": tuple(f"{prefix}.{{0}}.{{1}}" for prefix in prefixes)
        }
        return layered | {first_stage: _parameters(encoder)}
    decoder = tuple(f"{prefix}.{layer}" for prefix in prefixes for layer in shared_by)
    if encoder_shares:
        decoder = encoder = decoder + encoder
    return {rf"decoder\.{kind}_heads\.0\.(.*)": _parameters(decoder), first_stage: _parameters(encoder)}


def _parameters(modules: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{module}.{{0}}" for module in modules)


def _some(names: list[str]) -> str:
    return (
        "none" if not names else f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
    )
