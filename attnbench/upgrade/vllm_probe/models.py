"""vLLM's own rules for a model, which speak before its selector does."""

from __future__ import annotations

from typing import Any

from .engine import Case, hf_configs


def apply_model_rules(case: Case, config: Any, answer: dict[str, Any]) -> None:
    """Let the rules of the model's architecture change the configuration.

    Some models force a backend or a FlashAttention version
    (`vllm/model_executor/models/config.py`), some attend to images in both directions
    (`vllm/transformers_utils/model_arch_config_convertor.py`): both differ between versions.
    """
    if case.get("hf_config"):
        _mm_prefix(case, config, answer)
        _override(case, config, answer)


def _mm_prefix(case: Case, config: Any, answer: dict[str, Any]) -> None:
    try:
        from vllm.transformers_utils.model_arch_config_convertor import (
            MODEL_ARCH_CONFIG_CONVERTORS,
            ModelArchConfigConvertorBase,
        )

        hf_config, text_config = hf_configs(case)
        model_type = getattr(hf_config, "model_type", "")
        convertor = MODEL_ARCH_CONFIG_CONVERTORS.get(model_type, ModelArchConfigConvertorBase)
        answer["mm_prefix"] = bool(convertor(hf_config, text_config).is_mm_prefix_lm())
        config.model_config.is_mm_prefix_lm = answer["mm_prefix"]
    except Exception as error:  # this version has the rule elsewhere, or asks for more
        answer["not_evaluated"].append(f"model override: {type(error).__name__}: {error}")


def _override(case: Case, config: Any, answer: dict[str, Any]) -> None:
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    architecture = (case["hf_config"].get("architectures") or [""])[0]
    rule = MODELS_CONFIG_MAP.get(architecture)
    if rule is None:
        return
    attention = config.attention_config
    before = (attention.backend, attention.flash_attn_version)
    try:
        rule.verify_and_update_config(config)
    except Exception as error:  # most of a rule is about other things than attention
        answer["not_evaluated"].append(
            f"model override of {architecture}: {type(error).__name__}: {error}"
        )
    if attention.backend != before[0]:
        answer["model_override"] = f"{architecture} forces {attention.backend.name}"
    elif attention.flash_attn_version != before[1]:
        version = attention.flash_attn_version
        answer["model_override"] = f"{architecture} forces FlashAttention {version}"
