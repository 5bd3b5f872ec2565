"""Rotary parameters as a ``config.json`` spells them: base, scaling, and which method reads which number.

transformers 4 writes ``rope_theta`` beside ``rope_scaling``; 5 writes ``rope_parameters`` with both in it.
Both are read, and both are written.

Source: transformers 5.23, modeling_rope_utils, and the attention of MiniCPM3 there.

Choices, and the traps behind them:

- A number that no one reads here is refused by name: it would change every logit, and no error would tell.
- "linear" and "dynamic" know no context but ``max_position_embeddings``, whatever stands beside them.
- ``mscale`` and ``mscale_all_dim`` of YaRN act together or not at all. But MiniCPM3 multiplies its scores by
  the second, even alone; that is not built here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from reprlib import repr as shown

from ..config import ModelConfig, RopeScaling
from .weights import few

__all__ = ["rotary_from_json", "rotary_to_json"]

_READ = {  # what each method reads beside rope_type, rope_theta and the original context
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor"},
}
_ONE_CONTEXT = ("linear", "dynamic")


def rotary_from_json(
    values: Mapping[str, object], family: str, field: Callable[[str], object]
) -> dict[str, object]:
    """``rope_theta`` and, if the frequencies are scaled, ``rope_scaling`` of a `ModelConfig`.

    Args:
        values: all of a ``config.json``.
        family: the model_type that it names.
        field: a field of it by name, or the family's default.

    Raises:
        ValueError: a method or a number that is not read here.
    """
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise ValueError(
            f"the rotary parameters are {given!r}; expected one set for all layers, such as "
            '{"rope_type": "default", "rope_theta": 10000.0}.'
        )
    given = {name: value for name, value in given.items() if value is not None}
    theta = given.pop("rope_theta", None) or field("rope_theta")
    old_spelling = given.pop("type", "default")
    kind = given.pop("rope_type", old_spelling)
    for part in (given.pop("partial_rotary_factor", 1), values.get("partial_rotary_factor")):
        if part not in (1, None):
            raise ValueError(f"partial_rotary_factor is {shown(part)}; the decoder rotates whole heads.")
    original = given.pop("original_max_position_embeddings", None)
    original = values.get("original_max_position_embeddings") or original
    if kind == "default":
        if given:
            raise ValueError(
                f"the rotary parameters hold {few(sorted(given))} and no rope_type that reads them. Add it."
            )
        return {"rope_theta": theta}
    if kind == "yarn":
        given = _yarn(given, scores_too=family == "minicpm3")
    if kind in _READ and (unknown := sorted(given.keys() - _READ[kind])):
        raise ValueError(f"the rotary parameters of type {kind!r} hold {few(unknown)}, unknown here.")
    if original is None or kind in _ONE_CONTEXT:
        original = field("max_position_embeddings")
    return {
        "rope_theta": theta,
        "rope_scaling": RopeScaling(kind, original, **(given if kind in _READ else {})),
    }


def _yarn(given: dict[str, object], scores_too: bool) -> dict[str, object]:
    """The parameters of YaRN, with the factor of cosine and sine that two magnitudes make."""
    given = dict(given)
    if not given.pop("truncate", True):
        raise ValueError('truncate of "yarn" is false; the decoder rounds the borders of the ramp.')
    fine, whole = given.pop("mscale", None), given.pop("mscale_all_dim", None)
    if scores_too and whole:
        raise ValueError(
            f'mscale_all_dim of "yarn" is {shown(whole)}; the released attention multiplies its scores by '
            "it, and the decoder does not."
        )
    if fine and whole and "factor" in given:
        log = math.log(given["factor"])
        given.setdefault("attention_factor", (0.1 * fine * log + 1) / (0.1 * whole * log + 1))
    return given


def rotary_to_json(config: ModelConfig) -> dict[str, object]:
    """What ``config.json`` says of the rotary frequencies, in both spellings."""
    scaling = config.rope_scaling
    rope: dict[str, object] = {"rope_type": "default"}
    if scaling is not None:
        kept = _READ[scaling.rope_type] | {"rope_type"}
        if scaling.rope_type not in _ONE_CONTEXT:
            kept |= {"original_max_position_embeddings"}
        rope = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(scaling).items()
            if name in kept and value is not None
        }
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else rope,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
    }
