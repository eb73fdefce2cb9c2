"""A zoo of tiny models as people load them: one builder and one batch for each architecture.

Every model has the real forward of its architecture at a size that builds in a fraction of a
second, draws nothing at random while it runs (no dropout, no augmentation), and works in float64.
Models of torchvision and timm are listed too, and skipped where these packages do not load.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selective_lite as sl

SAMPLES, LENGTH, WORDS, CLASSES = 4, 8, 40, 3
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """One row of the zoo.

    Attributes
    ----------
    make
        Builds the model; `build` seeds it.
    draw
        Draws a batch from the generator it is given.
    loss
        ``(model, batch) -> scalar``.
    head
        As in `sl.weights`: ``()`` for a model that ends without one.
    refused
        Which tensor of it cannot be selected in part, and why, as the error says it.
    dtype
        Of the model and its floating inputs.
    """

    make: Callable[[], nn.Module]
    draw: Callable[[torch.Generator], Batch]
    loss: Callable[[nn.Module, Any], Tensor] = sl.model_loss
    head: tuple[str, ...] | None = None
    refused: str | None = None
    dtype: torch.dtype = torch.float64


def tensors(output: Any) -> list[Tensor]:
    """Every floating tensor of a model's output, in order."""
    if torch.is_tensor(output):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = tuple(output.values())
    return (
        [t for part in output for t in tensors(part)] if isinstance(output, (tuple, list)) else []
    )


def squares(model: nn.Module, batch: Batch) -> Tensor:
    """A loss for a model that has none: the mean square of each of its outputs, summed."""
    return sum(t.square().mean() for t in tensors(model(**batch)))


def classes(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of a plain module's logits."""
    return F.cross_entropy(model(batch["x"]), batch["labels"])


def outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    """What a model answers in evaluation mode, without its loss; its mode is restored."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    training = model.training
    model.eval()
    with torch.no_grad():
        found = [t.clone() for t in tensors(model(**inputs))]
    model.train(training)
    return found


@cache
def _built(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ZOO[name].make().to(ZOO[name].dtype)
        with torch.no_grad():  # no bias is left at zero, no norm at one
            for p in model.parameters():
                p.add_(0.02 * torch.randn_like(p))
    return model.eval()


def build(name: str) -> nn.Module:
    """The model of this name in evaluation mode: the same weights at every call, never shared."""
    return copy.deepcopy(_built(name))


def batch_of(name: str, seed: int = 1) -> Batch:
    """A batch for it, in the model's dtype."""
    drawn = ZOO[name].draw(torch.Generator().manual_seed(seed))
    dtype = ZOO[name].dtype
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in drawn.items()}


# Batches


def _ids(generator, words=WORDS, length=LENGTH):
    return torch.randint(4, words, (SAMPLES, length), generator=generator)


def _labels(generator, count=CLASSES):
    return torch.randint(0, count, (SAMPLES,), generator=generator)


def text(generator):
    ids = _ids(generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": _labels(generator),
    }


def language(generator):
    ids = _ids(generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def translation(generator):
    ids, labels = _ids(generator), _ids(generator, length=5)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "decoder_input_ids": labels.roll(1, 1),
        "labels": labels,
    }


def pixels(generator, size=16, channels=3):
    images = torch.randn(SAMPLES, channels, size, size, generator=generator)
    return {"pixel_values": images, "labels": _labels(generator)}


def images(generator, size=16):
    return {"pixel_values": torch.randn(SAMPLES, 3, size, size, generator=generator)}


def waves(generator, length=400):
    return {
        "input_values": torch.randn(SAMPLES, length, generator=generator),
        "labels": _labels(generator),
    }


def transcripts(generator):
    wave = torch.randn(SAMPLES, 400, generator=generator)
    return {
        "input_values": wave,
        "labels": torch.randint(1, 10, (SAMPLES, 3), generator=generator),
    }


def spectrograms(generator):
    return {
        "input_features": torch.randn(SAMPLES, 8, 32, generator=generator),
        "decoder_input_ids": _ids(generator, length=5),
        "labels": _ids(generator, length=5),
    }


def pictures_and_words(generator):
    ids = _ids(generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(SAMPLES, 3, 16, 16, generator=generator),
    }


# transformers

TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**TEXT, "num_key_value_heads": 1, "head_dim": 8}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 4,
}
SPEECH = {
    "vocab_size": 12,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "apply_spec_augment": False,
    "pad_token_id": 0,
}
SEQ2SEQ = {
    "vocab_size": WORDS,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def quiet(config):
    """Set every rate of dropout or jitter to zero, also in nested configurations."""
    for key, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            quiet(value)
        elif isinstance(value, float) and ("drop" in key or "jitter" in key):
            setattr(config, key, 0.0)
    return config


def _transformers(name, settings):
    import transformers

    cls, settings = getattr(transformers, name), dict(settings)
    if "backbone_config" in settings:
        settings["backbone_config"] = transformers.ResNetConfig(**settings["backbone_config"])
    experts = settings.pop("experts", None)
    config = quiet(cls.config_class(**settings))
    return cls._from_config(config, **({"experts_implementation": experts} if experts else {}))


def hf(cls, draw, settings, loss=sl.model_loss, head=None, **more):
    """A model of transformers: its class, its batches, its configuration."""
    return Architecture(partial(_transformers, cls, {**settings, **more}), draw, loss, head)


def base(cls, draw, settings, **more):
    """A model of transformers that has no loss of its own, and no task head."""
    return hf(cls, draw, settings, squares, (), **more)


def classifier(cls, settings=TEXT, draw=text, **more):
    return hf(cls, draw, settings, num_labels=CLASSES, **more)


ENCODERS = {
    "bert": classifier("BertForSequenceClassification"),
    "bert_mlm": hf("BertForMaskedLM", language, TEXT),
    "roberta": classifier("RobertaForSequenceClassification", max_position_embeddings=26),
    "distilbert": classifier(
        "DistilBertForSequenceClassification",
        {
            "vocab_size": WORDS,
            "dim": 16,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 24,
            "max_position_embeddings": 24,
        },
    ),
    "deberta": classifier(
        "DebertaForSequenceClassification", relative_attention=True, pos_att_type=["c2p", "p2c"]
    ),
    "deberta_v2": classifier(
        "DebertaV2ForSequenceClassification",
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=4,
        norm_rel_ebd="layer_norm",
        conv_kernel_size=3,
        share_att_key=True,
    ),
    "albert": classifier("AlbertForSequenceClassification", embedding_size=8),
    "electra": classifier("ElectraForSequenceClassification", embedding_size=8),
    "mpnet": classifier("MPNetForSequenceClassification", max_position_embeddings=26),
    "xlnet": classifier(
        "XLNetForSequenceClassification",
        {"vocab_size": WORDS, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24},
    ),
    "longformer": classifier(
        "LongformerForSequenceClassification", attention_window=4, max_position_embeddings=26
    ),
    "modernbert": classifier("ModernBertForSequenceClassification", cls_token_id=1, sep_token_id=2),
    "mobilebert_mlm": hf(
        "MobileBertForMaskedLM",
        language,
        TEXT,
        embedding_size=8,
        intra_bottleneck_size=8,
        num_feedforward_networks=2,
    ),
    "funnel": classifier(
        "FunnelForSequenceClassification",
        {
            "vocab_size": WORDS,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
            "d_model": 16,
            "n_head": 2,
            "d_head": 8,
            "d_inner": 24,
        },
    ),
    "convbert": classifier(
        "ConvBertForSequenceClassification", embedding_size=8, head_ratio=1, conv_kernel_size=3
    ),
    "squeezebert": classifier(
        "SqueezeBertForSequenceClassification",
        embedding_size=16,
        q_groups=2,
        k_groups=2,
        v_groups=2,
        post_attention_groups=1,
        intermediate_groups=2,
        output_groups=2,
    ),
    "fnet": hf(
        "FNetForSequenceClassification",
        lambda g: {k: v for k, v in text(g).items() if k != "attention_mask"},
        TEXT,
        num_labels=CLASSES,
    ),
    "roformer": classifier("RoFormerForSequenceClassification", embedding_size=16),
    "xlm": classifier(
        "XLMForSequenceClassification",
        {
            "vocab_size": WORDS,
            "emb_dim": 16,
            "n_layers": 2,
            "n_heads": 2,
            "max_position_embeddings": 24,
            "pad_index": 0,
        },
    ),
    "nystromformer": classifier(
        "NystromformerForSequenceClassification", segment_means_seq_len=8, num_landmarks=4
    ),
}
DECODERS = {
    "gpt2": hf(
        "GPT2LMHeadModel",
        language,
        {"vocab_size": WORDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24},
    ),
    "gpt2_classifier": classifier(
        "GPT2ForSequenceClassification",
        {
            "vocab_size": WORDS,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 24,
            "pad_token_id": 0,
        },
    ),
    "gpt_neo": hf(
        "GPTNeoForCausalLM",
        language,
        {
            "vocab_size": WORDS,
            "hidden_size": 16,
            "num_layers": 2,
            "attention_types": [[["global", "local"], 1]],
            "num_heads": 2,
            "intermediate_size": 24,
            "window_size": 4,
            "max_position_embeddings": 24,
        },
    ),
    "gptj": hf(
        "GPTJForCausalLM",
        language,
        {
            "vocab_size": WORDS,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 24,
            "rotary_dim": 4,
        },
    ),
    "gpt_neox": hf("GPTNeoXForCausalLM", language, TEXT),
    "llama": hf("LlamaForCausalLM", language, GROUPED, tie_word_embeddings=True),
    "llama_classifier": classifier("LlamaForSequenceClassification", GROUPED),
    "mistral": hf("MistralForCausalLM", language, GROUPED, sliding_window=4),
    "qwen2": hf("Qwen2ForCausalLM", language, GROUPED),
    "qwen3": hf("Qwen3ForCausalLM", language, GROUPED),
    "gemma2": hf("Gemma2ForCausalLM", language, GROUPED, query_pre_attn_scalar=8, sliding_window=4),
    "gemma3": hf("Gemma3ForCausalLM", language, GROUPED, query_pre_attn_scalar=8, sliding_window=4),
    "phi": hf("PhiForCausalLM", language, TEXT),
    "phi3": hf("Phi3ForCausalLM", language, GROUPED),
    "opt": hf(
        "OPTForCausalLM",
        language,
        {
            "vocab_size": WORDS,
            "hidden_size": 16,
            "word_embed_proj_dim": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 24,
            "max_position_embeddings": 24,
            "pad_token_id": 0,
        },
    ),
    "falcon": hf("FalconForCausalLM", language, TEXT, ffn_hidden_size=24),
    "bloom": hf(
        "BloomForCausalLM",
        language,
        {"vocab_size": WORDS, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    ),
    "mpt": hf(
        "MptForCausalLM",
        language,
        {
            "vocab_size": WORDS,
            "d_model": 16,
            "n_layers": 2,
            "n_heads": 2,
            "max_seq_len": 24,
            "expansion_ratio": 2,
        },
    ),
    "olmo2": hf("Olmo2ForCausalLM", language, GROUPED),
    "granite": hf("GraniteForCausalLM", language, GROUPED),
    "cohere": hf("CohereForCausalLM", language, GROUPED, use_qk_norm=True),
    "stablelm": hf("StableLmForCausalLM", language, GROUPED),
    "starcoder2": hf("Starcoder2ForCausalLM", language, GROUPED),
    "mamba": hf(
        "MambaForCausalLM",
        language,
        {
            "vocab_size": WORDS,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "state_size": 4,
            "time_step_rank": 2,
        },
    ),
    "mamba2": hf(
        "Mamba2ForCausalLM",
        language,
        {
            "vocab_size": WORDS,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "state_size": 4,
            "num_heads": 4,
            "head_dim": 8,
            "expand": 2,
            "n_groups": 1,
            "chunk_size": 4,
        },
    ),
    "falcon_mamba": hf(
        "FalconMambaForCausalLM",
        language,
        {
            "vocab_size": WORDS,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "state_size": 4,
            "time_step_rank": 2,
        },
    ),
    "recurrent_gemma": hf(
        "RecurrentGemmaForCausalLM",
        language,
        GROUPED,
        lru_width=16,
        block_types=["recurrent", "attention"],
        attention_window_size=4,
    ),
    "rwkv": hf(
        "RwkvForCausalLM",
        language,
        {
            "vocab_size": WORDS,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "attention_hidden_size": 16,
            "intermediate_size": 24,
            "use_cache": False,  # in evaluation it is written in place, so that no backward follows
            "context_length": 16,
        },
    ),
}
MIXTURES = {
    "mixtral": hf(
        "MixtralForCausalLM",
        language,
        GROUPED,
        num_local_experts=3,
        num_experts_per_tok=2,
        experts="eager",
    ),
    "qwen2_moe": hf(
        "Qwen2MoeForCausalLM",
        language,
        GROUPED,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        experts="eager",
    ),
    "qwen3_moe": hf(
        "Qwen3MoeForCausalLM",
        language,
        GROUPED,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        experts="eager",
    ),
    "deepseek_v3": hf(
        "DeepseekV3ForCausalLM",
        language,
        TEXT,
        num_key_value_heads=2,
        moe_intermediate_size=8,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        first_k_dense_replace=1,
        experts="eager",
    ),
    "olmoe": hf(
        "OlmoeForCausalLM", language, GROUPED, num_experts=3, num_experts_per_tok=2, experts="eager"
    ),
    "gpt_oss": hf(
        "GptOssForCausalLM",
        language,
        GROUPED,
        num_local_experts=3,
        num_experts_per_tok=2,
        sliding_window=4,
        experts="eager",
    ),
    "jamba": hf(
        "JambaForCausalLM",
        language,
        {**GROUPED, "num_hidden_layers": 2},
        num_experts=2,
        num_experts_per_tok=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=4,
        mamba_d_conv=2,
        mamba_dt_rank=2,
        use_mamba_kernels=False,
        experts="eager",
    ),
    "mixtral_batched": hf(
        "MixtralForCausalLM",
        language,
        GROUPED,
        num_local_experts=3,
        num_experts_per_tok=2,
        experts="batched_mm",
    ),
    "mixtral_grouped": replace(  # transformers' default way, which has no float64
        hf(
            "MixtralForCausalLM",
            language,
            GROUPED,
            num_local_experts=3,
            num_experts_per_tok=2,
            experts="grouped_mm",
        ),
        dtype=torch.float32,
    ),
    "switch": replace(  # its forward casts the router to float32
        hf(
            "SwitchTransformersForConditionalGeneration",
            translation,
            {
                "vocab_size": WORDS,
                "d_model": 16,
                "d_kv": 8,
                "d_ff": 24,
                "num_layers": 2,
                "num_decoder_layers": 2,
                "num_sparse_encoder_layers": 1,
                "num_sparse_decoder_layers": 1,
                "num_heads": 2,
                "num_experts": 2,
                "pad_token_id": 0,
                "decoder_start_token_id": 0,
            },
        ),
        dtype=torch.float32,
    ),
}
ENCODER_DECODERS = {
    "t5": hf(
        "T5ForConditionalGeneration",
        translation,
        {
            "vocab_size": WORDS,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 1,
            "num_heads": 2,
            "pad_token_id": 0,
            "decoder_start_token_id": 0,
        },
    ),
    "t5_gated": hf(
        "T5ForConditionalGeneration",
        translation,
        {
            "vocab_size": WORDS,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 1,
            "num_heads": 2,
            "pad_token_id": 0,
            "decoder_start_token_id": 0,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        },
    ),
    "bart": hf("BartForConditionalGeneration", translation, SEQ2SEQ),
    "bart_classifier": hf(
        "BartForSequenceClassification",
        lambda g: {
            **text(g),
            "input_ids": torch.cat([_ids(g, length=LENGTH - 1), torch.full((SAMPLES, 1), 2)], 1),
        },
        SEQ2SEQ,
        num_labels=CLASSES,
    ),
    "m2m_100": hf("M2M100ForConditionalGeneration", translation, SEQ2SEQ),
    "marian": hf("MarianMTModel", translation, SEQ2SEQ),
    "pegasus": hf("PegasusForConditionalGeneration", translation, SEQ2SEQ),
    "whisper": hf(
        "WhisperForConditionalGeneration",
        spectrograms,
        {**SEQ2SEQ, "max_source_positions": 16, "max_target_positions": 8, "num_mel_bins": 8},
    ),
}
VISION_AND_AUDIO = {
    "vit": classifier("ViTForImageClassification", VISION, pixels),
    "deit": classifier("DeiTForImageClassification", VISION, pixels),
    "beit": classifier(
        "BeitForImageClassification", VISION, pixels, use_relative_position_bias=True
    ),
    "dinov2": classifier("Dinov2ForImageClassification", VISION, pixels, mlp_ratio=2),
    "swin": classifier(
        "SwinForImageClassification",
        {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [2, 1],
            "num_heads": [2, 2],
            "window_size": 4,
        },
        pixels,
    ),
    "swinv2": classifier(
        "Swinv2ForImageClassification",
        {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [2, 1],
            "num_heads": [2, 2],
            "window_size": 4,
        },
        pixels,
    ),
    "resnet": classifier(
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        pixels,
    ),
    "convnext": classifier(
        "ConvNextForImageClassification",
        {
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "num_stages": 2,
            "image_size": 16,
            "patch_size": 2,
        },
        pixels,
    ),
    "mobilenet_v2": classifier(
        "MobileNetV2ForImageClassification",
        {
            "image_size": 32,
            "depth_multiplier": 0.1,
            "min_depth": 4,
            "depth_divisible_by": 4,
            "last_hidden_size": 16,
            "finegrained_output": False,
        },
        partial(pixels, size=32),
    ),
    "segformer": hf(
        "SegformerForImageClassification",
        pixels,
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "num_labels": CLASSES,
        },
    ),
    "vit_base": base("ViTModel", images, VISION),
    "clip": base(
        "CLIPModel",
        pictures_and_words,
        {
            "projection_dim": 8,
            "text_config": {**TEXT, "hidden_act": "quick_gelu"},
            "vision_config": VISION,
        },
    ),
    "siglip": base(
        "SiglipModel", pictures_and_words, {"text_config": TEXT, "vision_config": VISION}
    ),
    "sam": base(
        "SamModel",
        lambda g: {**images(g, 16), "input_points": torch.rand(SAMPLES, 1, 2, 2, generator=g) * 16},
        {
            "vision_config": {
                "hidden_size": 16,
                "output_channels": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 4,
                "window_size": 2,
                "global_attn_indexes": [1],
                "mlp_dim": 24,
                "num_pos_feats": 4,
            },
            "prompt_encoder_config": {
                "hidden_size": 8,
                "image_size": 16,
                "patch_size": 4,
                "mask_input_channels": 4,
            },
            "mask_decoder_config": {
                "hidden_size": 8,
                "mlp_dim": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "iou_head_hidden_dim": 8,
                "iou_head_depth": 2,
            },
        },
    ),
    "detr": hf(
        "DetrForObjectDetection",
        partial(images, size=32),
        {
            "use_timm_backbone": False,
            "backbone": None,
            "use_pretrained_backbone": False,
            "backbone_config": {
                "embedding_size": 8,
                "hidden_sizes": [8, 16],
                "depths": [1, 1],
                "layer_type": "basic",
                "out_features": ["stage2"],
            },
            "num_queries": 4,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "num_labels": CLASSES,
        },
        squares,
    ),
    "wav2vec2": classifier("Wav2Vec2ForSequenceClassification", SPEECH, waves),
    "wav2vec2_ctc": hf("Wav2Vec2ForCTC", transcripts, SPEECH),
    "wavlm": classifier(
        "WavLMForSequenceClassification", SPEECH, waves, num_buckets=8, max_bucket_distance=16
    ),
    "hubert": classifier("HubertForSequenceClassification", SPEECH, waves),
    "ast": classifier(
        "ASTForAudioClassification",
        {**VISION, "max_length": 16, "num_mel_bins": 8, "frequency_stride": 4, "time_stride": 4},
        lambda g: {"input_values": torch.randn(SAMPLES, 16, 8, generator=g), "labels": _labels(g)},
    ),
}

# torch.nn


class WithClassifier(nn.Module):
    """A body, the mean of what it gives for each sample, and a classifier."""

    def __init__(self, body: nn.Module, width: int, channels_first: bool = False):
        super().__init__()
        self.body, self.channels_first = body, channels_first
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, x):
        hidden = self.body(x)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        if self.channels_first:
            hidden = hidden.movedim(1, -1)
        return self.classifier(hidden.flatten(1, -2).mean(1) if hidden.dim() > 2 else hidden)


class Attention(nn.Module):
    """Self-attention, then attention to keys and values of other widths."""

    def __init__(self):
        super().__init__()
        self.own = nn.MultiheadAttention(16, 2, batch_first=True)
        self.other = nn.MultiheadAttention(
            16, 2, kdim=8, vdim=4, batch_first=True, bias=False, add_bias_kv=True
        )

    def forward(self, x):
        hidden, _ = self.own(x, x, x, need_weights=False)
        return self.other(hidden, x[..., :8], x[..., 8:12])[0]


class Seq2Seq(nn.Module):
    """torch's encoder-decoder."""

    def __init__(self):
        super().__init__()
        self.transformer = nn.Transformer(16, 2, 1, 1, 24, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.transformer(x, x.flip(1))


class Tied(nn.Module):
    """An embedding whose weight a function reads for the output, without a module of its own."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 16)
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        return F.linear(torch.tanh(self.layer(self.embedding(x))), self.embedding.weight)


class Bare(nn.Module):
    """Parameters that belong to no layer: a matrix, a list, a dictionary, a scalar."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(16, 16))
        self.scale = nn.Parameter(torch.ones(()))
        self.rows = nn.ParameterList([torch.randn(16), torch.randn(16, 16)])
        self.parts = nn.ParameterDict({"left": torch.randn(16, 4), "right": torch.randn(4, 16)})

    def forward(self, x):
        hidden = torch.tanh(x @ self.matrix + self.rows[0])
        return hidden @ self.rows[1] + self.scale * (
            hidden @ self.parts["left"] @ self.parts["right"]
        )


class Scaled(nn.Linear):
    """A subclass of a layer with a forward of its own."""

    def forward(self, input):
        return F.linear(input, self.weight / self.weight.norm(), self.bias)


class Twice(nn.Linear):
    """A subclass whose forward calls its parent's, and reads the weight once more."""

    def forward(self, input):
        return super().forward(input) + input @ self.weight


class Stack(nn.Sequential):
    """A container with a parameter of its own."""

    def __init__(self):
        super().__init__(nn.Linear(16, 16), nn.Tanh())
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, input):
        return super().forward(input) * self.scale


class Shared(nn.Module):
    """One layer called twice, and its weight once more as a bilinear form."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.both = nn.Bilinear(16, 16, 16)

    def forward(self, x):
        hidden = self.layer(torch.relu_(self.layer(x)))
        return self.both(hidden, x) + x @ self.layer.weight


def _encoder(norm_first=False):
    layer = nn.TransformerEncoderLayer(
        16, 2, 24, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="circular"),
        nn.BatchNorm2d(8),
        nn.PReLU(8),
        nn.ConvTranspose2d(8, 12, 2, stride=2),
        nn.GroupNorm(3, 12),
        nn.SiLU(),
        nn.Conv2d(12, 16, 1),
    )


def _normed(norm):
    return nn.Sequential(norm(nn.Linear(16, 24)), nn.Tanh(), norm(nn.Linear(24, 16)))


def sequences(generator):
    return {
        "x": torch.randn(SAMPLES, LENGTH, 16, generator=generator),
        "labels": _labels(generator),
    }


def pictures(generator, size=16):
    return {
        "x": torch.randn(SAMPLES, 3, size, size, generator=generator),
        "labels": _labels(generator),
    }


def words(generator):
    return {"x": _ids(generator), "labels": _labels(generator)}


def next_words(generator):
    ids = _ids(generator)
    return {"x": ids, "labels": ids.clone()}


def next_word(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of a plain language model's logits."""
    return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["labels"].flatten())


def plain(body, draw=sequences, width=16, **options):
    """A body of torch.nn under a classifier."""

    def make():
        return WithClassifier(body(), width, draw is pictures)

    return Architecture(make, draw, classes, **options)


MODULES = {
    "torch_encoder": plain(_encoder),
    "torch_encoder_norm_first": plain(partial(_encoder, norm_first=True)),
    "torch_transformer": plain(Seq2Seq),
    "torch_attention": plain(Attention),
    "torch_lstm": plain(
        partial(nn.LSTM, 16, 8, num_layers=2, bidirectional=True, batch_first=True)
    ),
    "torch_lstm_projected": plain(partial(nn.LSTM, 16, 24, proj_size=16, batch_first=True)),
    "torch_gru": plain(partial(nn.GRU, 16, 16, batch_first=True)),
    "torch_convolutions": plain(_convolutions, pictures),
    "torch_embedding_bag": plain(partial(nn.EmbeddingBag, WORDS, 16), words),
    "torch_tied_by_a_function": Architecture(Tied, next_words, next_word, ()),
    "torch_bare_parameters": plain(Bare),
    "torch_linear_subclass": plain(
        lambda: nn.Sequential(Scaled(16, 16), nn.Tanh(), Scaled(16, 16))
    ),
    "torch_linear_subclass_of_two_reads": plain(partial(Twice, 16, 16)),
    "torch_shared_layer": plain(Shared),
    "torch_weight_norm": plain(partial(_normed, nn.utils.parametrizations.weight_norm)),
    "torch_spectral_norm": plain(partial(_normed, nn.utils.parametrizations.spectral_norm)),
    "torch_spectral_norm_by_hook": plain(partial(_normed, nn.utils.spectral_norm)),
    "torch_max_norm": plain(
        partial(nn.Embedding, WORDS, 16, max_norm=1.0),
        words,
        refused="'body.weight' is an embedding with max_norm",
    ),
    "torch_parameter_of_a_container": plain(
        Stack, refused="'body.scale' belongs to a Stack itself, whose children"
    ),
}

# torchvision and timm


def _installed(package):
    """The package, or a skipped test: CPU builds of torchvision are not in the registry."""
    try:
        return __import__(package)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{package} does not load: {error}")


def _torchvision(path, *arguments, **settings):
    models = _installed("torchvision").models
    make = models
    for part in path.split("."):
        make = getattr(make, part)
    return make(*arguments, num_classes=CLASSES, **settings)


def _convnext():
    block = _installed("torchvision").models.convnext.CNBlockConfig
    return _torchvision("ConvNeXt", [block(8, 16, 1), block(16, None, 1)])


def _timm(name, **settings):
    _installed("torchvision")
    return _installed("timm").create_model(name, num_classes=CLASSES, **settings)


def vision(make, *arguments, size=16, **settings):
    """A model of torchvision or timm, called with images alone."""
    return Architecture(
        partial(make, *arguments, **settings), partial(pictures, size=size), classes
    )


WINDOWS = {
    "patch_size": [2, 2],
    "embed_dim": 8,
    "depths": [2, 1],
    "num_heads": [1, 2],
    "window_size": [4, 4],
    "stochastic_depth_prob": 0.0,
}
TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
PACKAGES = {
    "torchvision_swin": vision(_torchvision, "SwinTransformer", **WINDOWS),
    "torchvision_vit": vision(_torchvision, "VisionTransformer", 16, 4, 2, 2, 16, 24),
    "torchvision_convnext": vision(_convnext),
    "torchvision_mobilenet_v2": vision(
        _torchvision,
        "MobileNetV2",
        width_mult=0.1,
        round_nearest=4,
        dropout=0.0,
        inverted_residual_setting=[[2, 8, 1, 1], [2, 16, 1, 2]],
    ),
    "torchvision_densenet": vision(
        _torchvision, "DenseNet", growth_rate=4, block_config=(2, 2), num_init_features=8
    ),
    "timm_vit": vision(_timm, "vit_tiny_patch16_224", **TINY),
    "timm_beit": vision(_timm, "beit_base_patch16_224", **TINY),
    "timm_eva02": vision(_timm, "eva02_tiny_patch14_224", **TINY),
    "timm_swinv2": vision(
        _timm,
        "swinv2_tiny_window8_256",
        img_size=16,
        patch_size=2,
        embed_dim=8,
        depths=(2, 1),
        num_heads=(1, 2),
        window_size=4,
        drop_path_rate=0.0,
    ),
    "timm_convnext": vision(
        _timm, "convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 16), size=32
    ),
    "timm_resnet": vision(_timm, "resnet10t", channels=(8, 8, 8, 16), stem_width=8, size=32),
}
ZOO: dict[str, Architecture] = {
    **ENCODERS,
    **DECODERS,
    **MIXTURES,
    **ENCODER_DECODERS,
    **VISION_AND_AUDIO,
    **MODULES,
    **PACKAGES,
}
