"""Families of released models: what each calls the numbers and tensors of the same block.

    llama, mistral    no multipliers
    minicpm           scale_emb, scale_depth, dim_model_base; with num_experts a mixture of experts
    minicpm3          the same, with latent attention
    granite           the same multipliers under other names: transformers and vLLM run a MiniCPM as Granite
    mixtral           a mixture of experts without multipliers

Sources: released config.json and modelling code of MiniCPM 1, 2, 3, 4, 4.1; transformers 5.23 for the others.

Choices, and the traps behind them:

- What is not understood is refused, because a model that is almost right still writes fluent text.
- The default of a missing field belongs to the family: tables are tied by default in MiniCPM, untied in
  Llama. Where no default is known, the field is required.
- Granite's attention_multiplier is 1 by default, not 1/sqrt(head_dim), and its residual_multiplier is the
  whole factor, scale_depth / sqrt(num_hidden_layers).
- ``eos_token_id`` is a number, a list or null. Where it is missing no id ends a text: the 2 that the classes
  of transformers then hold is Llama 2's, and ``generate`` does not ask them.
- ``sparse_config`` of MiniCPM4 and 4.1 is no part of the shape: the weights are those of dense attention, and
  up to ``dense_len`` tokens the released code computes the same. Whoever wants it for longer texts makes a
  context of it: `config.sparse_config` reads it, `inference.sparse_attention` says how.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace

from ..config import (
    LatentAttentionConfig,
    MixtureConfig,
    ModelConfig,
    require_positive_integer,
    require_positive_number,
)
from .rotary_parameters import rotary_from_json, rotary_to_json

__all__ = [
    "FAMILIES",
    "config_from_json",
    "config_to_json",
    "end_ids_to_json",
    "family_of",
    "own_family",
    "stored_name",
]

FAMILIES = {  # model_type: the class that transformers, vLLM and others look for
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "minicpm": "MiniCPMForCausalLM",
    "minicpm3": "MiniCPM3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "mixtral": "MixtralForCausalLM",
}
_REQUIRED = object()
_DEFAULTS = {  # of fields that a config.json may leave out, by family; "" is for all others
    "tie_word_embeddings": {"minicpm": True, "minicpm3": True, "": False},
    "num_key_value_heads": {"mistral": _REQUIRED, "mixtral": _REQUIRED, "": None},
    "rope_theta": {"mixtral": 1_000_000.0, "": 10_000.0},
    "sliding_window": {"mistral": 4096, "": None},
    "scale_emb": {"minicpm3": 12, "": _REQUIRED},
    "scale_depth": {"minicpm3": 1.4, "": _REQUIRED},
    "dim_model_base": {"minicpm3": 256, "": _REQUIRED},
    "embedding_multiplier": {"": 1.0},
    "residual_multiplier": {"": 1.0},
    "attention_multiplier": {"": 1.0},
    "logits_scaling": {"": 1.0},
    "num_local_experts": {"": 8},
    "num_experts": {"": 0},
    "num_experts_per_tok": {"mixtral": 2, "": _REQUIRED},
    "router_aux_loss_coef": {"mixtral": 0.001, "": 0.01},
    "q_lora_rank": {"": 768},
    "kv_lora_rank": {"": 256},
    "qk_nope_head_dim": {"": 64},
    "qk_rope_head_dim": {"": 32},
    "v_head_dim": {"": None},
    "head_dim": {"": None},
    "hidden_act": {"": "silu"},
    "initializer_range": {"": 0.02},
    "eos_token_id": {"": None},
}


def stored_name(name: str, model_type: str) -> str:
    """The name of a decoder's parameter in a checkpoint of the family.

    >>> stored_name("layers.1.mlp.up_proj.weight", "llama")
    'model.layers.1.mlp.up_proj.weight'
    >>> stored_name("layers.1.mlp.experts.5.up_proj.weight", "mixtral")
    'model.layers.1.block_sparse_moe.experts.5.w3.weight'
    """
    if name == "lm_head.weight":
        return name
    if ".experts." in name:
        for ours, theirs in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            name = name.replace(ours, theirs)
    if model_type == "mixtral":
        name = name.replace(".mlp.", ".block_sparse_moe.")
    return f"model.{name}"


def config_from_json(values: Mapping[str, object], where: str = "The config") -> ModelConfig:
    """The shape that a ``config.json`` describes.

    Args:
        values: its content.
        where: the file's name, for messages.

    Raises:
        ValueError: a field is missing or cannot be, the family is unknown, or the model computes something
            that this library does not.
    """
    try:
        return _config_from_json(values)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{where}: {error}") from None


def family_of(values: Mapping[str, object]) -> str:
    """The family that a ``config.json`` names, or a sentence that it is unknown."""
    family = values.get("model_type")
    if family is None:  # the first releases name only the class
        classes = {name: family for family, name in FAMILIES.items()}
        family = next((classes[name] for name in values.get("architectures") or [] if name in classes), None)
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(
            f"model_type is {family!r}; known are {', '.join(FAMILIES)}. A model of another family computes "
            "something else, even if its tensors have the same names."
        )
    return family


def _config_from_json(values: Mapping[str, object]) -> ModelConfig:
    family = family_of(values)

    def field(name: str):
        defaults = _DEFAULTS.get(name, {})
        value = values.get(name, defaults.get(family, defaults.get("", _REQUIRED)))
        if value is _REQUIRED:
            raise ValueError(
                f"the field {name} is missing, and {family} has no default for it that is known. Add it."
            )
        return value

    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "vocab_size", "max_position_embeddings", "rms_norm_eps",
             "tie_word_embeddings", "head_dim", "eos_token_id")  # fmt: skip
    config = ModelConfig(
        **{name: field(name) for name in sizes} | _latent_attention(family, field),
        init_std=field("initializer_range"),
        **rotary_from_json(values, family, field),
    )
    if family in ("minicpm", "minicpm3"):
        depth, base = field("scale_depth"), field("dim_model_base")
        config = replace(
            config,
            scale_emb=field("scale_emb"),
            scale_depth=None if depth == config.num_hidden_layers**0.5 else depth,
            dim_model_base=None if base == config.hidden_size else base,
        )
    if family == "granite":
        for name in ("residual_multiplier", "logits_scaling", "attention_multiplier"):
            require_positive_number(name, field(name))
        residual, division = field("residual_multiplier"), field("logits_scaling")
        config = replace(
            config,
            scale_emb=field("embedding_multiplier"),
            scale_depth=None if residual == 1 else _short(residual * config.num_hidden_layers**0.5),
            dim_model_base=None if division == 1 else _short(config.hidden_size / division),
        )
    if experts := field("num_local_experts" if family == "mixtral" else "num_experts"):
        config = replace(
            config,
            mixture=MixtureConfig(experts, field("num_experts_per_tok"), field("router_aux_loss_coef")),
        )
    _refuse_other_computations(family, config, values, field)
    return config


def _latent_attention(family: str, field: Callable[[str], object]) -> dict[str, object]:
    if family != "minicpm3":
        return {}
    require_positive_integer("num_attention_heads", field("num_attention_heads"))
    if field("q_lora_rank") is None:
        raise ValueError("q_lora_rank is null, one undivided query projection, which is not built here.")
    sizes = {size.name: field(size.name) for size in fields(LatentAttentionConfig)}
    if sizes["v_head_dim"] is None:
        sizes["v_head_dim"] = field("hidden_size") // field("num_attention_heads")
    latent = LatentAttentionConfig(**sizes)
    return {
        "latent_attention": latent,
        "head_dim": latent.qk_nope_head_dim + latent.qk_rope_head_dim,
        "num_key_value_heads": field("num_attention_heads"),
    }


def _refuse_other_computations(
    family: str, config: ModelConfig, values: Mapping[str, object], field: Callable[[str], object]
) -> None:
    """Refuse a config by which the released model gives other logits than the decoder would."""
    for name in ("attention_bias", "mlp_bias", "quantization_config", "rope_interleaved",
                 "use_sliding_window"):  # fmt: skip
        if values.get(name):
            raise ValueError(f"{name} is {values[name]!r}, and the decoder has none of it.")
    if values.get("is_causal") is False:
        raise ValueError("is_causal is false: tokens see what follows them, and the decoder's do not.")
    if field("hidden_act") != "silu":
        raise ValueError(f"hidden_act is {field('hidden_act')!r}; the decoder's feed-forward uses silu.")
    window = field("sliding_window")
    if window is not None and window < config.max_position_embeddings:
        raise ValueError(
            f"sliding_window is {window}{'' if 'sliding_window' in values else ' by default'}, and the "
            f"decoder sees all {config.max_position_embeddings} tokens of the context."
        )
    if family == "granite" and not math.isclose(
        field("attention_multiplier"), config.head_dim**-0.5, rel_tol=1e-6
    ):
        raise ValueError(
            f"attention_multiplier is {field('attention_multiplier')}; the decoder scales by "
            f"1/sqrt(head_dim), {config.head_dim**-0.5:.6g}."
        )
    if config.mixture and family not in ("minicpm", "mixtral"):
        raise ValueError(f"num_experts is {config.mixture.num_experts}; {family} has no mixture of experts.")


def config_to_json(config: ModelConfig, model_type: str) -> dict[str, object]:
    """What ``config.json`` says of a model, as the family spells it; transformers 4 and 5 both read it.

    Raises:
        ValueError: the family is unknown, or computes something else than the config asks for.
    """
    if model_type not in FAMILIES or model_type == "mistral":
        raise ValueError(
            f"model_type is {model_type!r}; models are written as one of "
            f"{', '.join(name for name in FAMILIES if name != 'mistral')}."
        )
    if reason := _why_not(config, model_type):
        raise ValueError(f"The model cannot be written as {model_type!r}: {reason}")
    values = {
        "architectures": [FAMILIES[model_type]],
        "model_type": model_type,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.init_std,
        # left out, these would be the ids of Llama 2 in other programs
        "bos_token_id": None,
        "eos_token_id": end_ids_to_json(config),
        "pad_token_id": None,
    } | rotary_to_json(config)
    if model_type == "mixtral" or model_type != "minicpm3" and not _has_plain_heads(config):
        values["head_dim"] = config.head_dim
    if model_type in ("minicpm", "minicpm3"):
        values["scale_emb"] = config.scale_emb
        values["scale_depth"] = config.scale_depth or config.num_hidden_layers**0.5
        values["dim_model_base"] = config.dim_model_base or config.hidden_size
    if model_type == "minicpm3":
        values |= asdict(config.latent_attention)
    if model_type == "granite":
        values["embedding_multiplier"] = config.scale_emb
        values["residual_multiplier"] = config.residual_scale
        values["attention_multiplier"] = config.head_dim**-0.5
        values["logits_scaling"] = config.width_ratio
    if config.mixture is not None:
        values["num_local_experts" if model_type == "mixtral" else "num_experts"] = config.mixture.num_experts
        values["num_experts_per_tok"] = config.mixture.num_experts_per_token
        values["router_aux_loss_coef"] = config.mixture.balance_loss_weight
    return values


def end_ids_to_json(config: ModelConfig) -> int | list[int] | None:
    """``eos_token_id`` as released files spell it: a number, a list of several, or null."""
    ends = list(config.eos_token_id)
    return ends if len(ends) > 1 else ends[0] if ends else None


def _why_not(config: ModelConfig, model_type: str) -> str | None:
    """What the model has that the family has not, or the other way round; None if they fit."""
    scaling = config.rope_scaling
    if config.latent_attention and config.mixture:
        return "it has latent attention and a mixture of experts, which no family has together."
    if config.latent_attention and model_type != "minicpm3":
        return 'it has latent attention. Write it as "minicpm3".'
    if model_type == "minicpm3" and not config.latent_attention:
        return "it has no latent attention."
    if config.latent_attention and config.num_key_value_heads != config.num_attention_heads:
        return (
            f"it has {config.num_attention_heads} heads and num_key_value_heads is "
            f"{config.num_key_value_heads}; latent attention shares none. Make them the same in the config."
        )
    if config.mixture and model_type not in ("mixtral", "minicpm"):
        return 'it has a mixture of experts. Write it as "mixtral", or with multipliers as "minicpm".'
    if model_type == "mixtral" and not config.mixture:
        return "it has no mixture of experts."
    if model_type == "mixtral" and _has_multipliers(config):
        return 'it has multipliers. Write it as "minicpm".'
    if model_type == "llama" and _has_multipliers(config):
        return (
            'it has multipliers. Write it as "granite", which has them under other names, or fold them into '
            "the weights first, with language.multipliers.fold_to_llama."
        )
    if model_type == "minicpm" and not _has_plain_heads(config):
        return (
            f"its heads are {config.head_dim} wide, and the released code of that family takes "
            f"hidden_size / num_attention_heads, {config.hidden_size // config.num_attention_heads}."
        )
    if scaling and scaling.rope_type == "dynamic":
        original = scaling.original_max_position_embeddings
        if original != config.max_position_embeddings:
            return (
                f'its "dynamic" rope scaling starts at {original} tokens, and other programs start at '
                f"max_position_embeddings, {config.max_position_embeddings}. Make them the same "
                "with dataclasses.replace; whoever loads it sets the longer limit again."
            )
    return None


def _has_multipliers(config: ModelConfig) -> bool:
    return (config.scale_emb, config.residual_scale, config.width_ratio) != (1, 1, 1)


def _has_plain_heads(config: ModelConfig) -> bool:
    return config.head_dim * config.num_attention_heads == config.hidden_size


def own_family(config: ModelConfig) -> str:
    """The family in which a model is written unless another is asked for.

    It is one that transformers opens without code from elsewhere, where there is one.

    >>> own_family(ModelConfig(64, 160, 2, 4, 256, scale_emb=12))
    'granite'
    """
    if config.latent_attention:
        return "minicpm3"
    if _has_multipliers(config):
        return "minicpm" if config.mixture else "granite"
    return "mixtral" if config.mixture else "llama"


def _short(value: float) -> float:
    """The number without the last digits that a root and a product left: 1.4, not 1.4000000000000001."""
    return round(value, 9) if math.isclose(value, round(value, 9), rel_tol=1e-13) else value
