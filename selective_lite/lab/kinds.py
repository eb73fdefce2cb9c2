"""Kinds: what a parameter does, read out of its dotted name."""

from __future__ import annotations

import re

# What a parameter does, by the names that `transformers`, timm and torchvision give; first match.
KINDS = (
    ("norm, bias", r"norm|\bln_|\.bias$|^bias$|_bias$"),
    ("embed", r"embed|\bwte\b|\bwpe\b|cls_token|position"),
    ("query", r"query|\bq_(proj|lin)"),
    ("key", r"\bkey\b|\bk_(proj|lin)"),
    ("value", r"value|\bv_(proj|lin)"),
    ("q, k, v", r"c_attn|in_proj|qkv"),
    ("attn out", r"attention\.output|attn\.c_proj|\bo_proj|out_lin|(attn|attention)\.out_proj"),
    ("ffn in", r"intermediate|gate_proj|up_proj|c_fc|lin1|linear1|fc1"),
    ("ffn out", r"output\.dense|down_proj|mlp\.c_proj|lin2|linear2|fc2"),
)


def kind_of(name: str) -> str:
    """What a parameter does, judged by its name: one of the labels in `KINDS`, or ``"other"``."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.I)), "other")
