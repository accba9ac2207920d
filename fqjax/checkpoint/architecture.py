"""The architecture and its configuration, from config.json."""

from pathlib import Path

from fqjax.checkpoint.compressed.config import read_quantization
from fqjax.checkpoint.fields import ModelConfig, check_counts
from fqjax.checkpoint.foreign import foreign_inside
from fqjax.checkpoint.lazy import quiet_transformers
from fqjax.models import FAMILIES
from fqjax.models.rotary import check_rope
from fqjax.registry import known
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import JsonObject, exists, linked, read_json, reason
from fqjax.runtime.validation import check_given, check_value, validated

REQUIRED_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
"""Sizes that every configuration has to have: transformers would fill in those of some well-known model."""

TRUNK_ENDING, HEAD_ENDING = "Model", "ForCausalLM"
"""Ends of the names that transformers gives a trunk alone, and the language model that it is the trunk of."""


def read_architecture(directory: Path) -> tuple[str, ModelConfig]:
    """The architecture's name and the family's configuration, from config.json.

    Raises:
      InputError: if there is no config.json, it names an architecture that fqjax does not have or two at once, or an entry
        is missing, absurd or not supported.
    """
    if not exists(directory / "config.json"):
        found = foreign_inside(directory)
        raise InputError(f"{directory}: not a model directory: it has no config.json" + (f"; {found}" if found else ""))
    path = linked(directory, "config.json")
    raw = read_json(path, "configuration")
    name = _architecture(path, raw)
    family = FAMILIES[name]
    check_counts(str(path), raw)
    check_given(family.config, raw, str(path))
    check_value(str, raw.get("model_type"), str(path), "model_type")
    if raw["model_type"] != family.model_type:
        raise InputError(
            f"{path}: architectures says {name} and model_type {raw['model_type']!r}, which is another; expected "
            f"{family.model_type!r}"
        )
    read_quantization(directory)  # What cannot be expressed is better known now than later.
    complete = _completed(path, raw)
    try:
        check_rope(raw)
        config = family.config_from_hf(complete)
    except InputError as error:
        raise InputError(f"{directory}: {error}") from None
    except KeyError as error:
        raise InputError(f"{path}: a {name} configuration needs an entry {error}") from None
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise InputError(f"{path}: not a valid {name} configuration ({error})") from None
    return name, validated(family.config, vars(config), str(path))


def _architecture(path: Path, raw: JsonObject) -> str:
    """The name in :data:`FAMILIES` that "architectures" gives, a trunk's or one in other capitals too; else "model_type"."""
    names = raw.get("architectures")
    if names is None or names == []:
        kind = raw.get("model_type")
        if kind is None:
            raise InputError(f"{path}: architecture not named; expected an entry 'architectures' or 'model_type'")
        named = next((name for name, family in FAMILIES.items() if family.model_type == kind), None)
        name = f"of model_type {kind!r:.60}"
    else:
        name = names[0] if isinstance(names, list) else names
        if isinstance(name, str) and name in FAMILIES:
            return name
        spelt = {full.lower(): full for full in FAMILIES}
        spelt |= {full.removesuffix(HEAD_ENDING).lower() + TRUNK_ENDING.lower(): full for full in FAMILIES}
        named = spelt.get(name.lower()) if isinstance(name, str) else None
    if named is None:
        raise InputError(f"{path}: architecture {name} is not supported; supported are {known('families')}")
    return named


def _completed(path: Path, raw: JsonObject) -> JsonObject:
    """The configuration with transformers' defaults for what it leaves out, but for the sizes in :data:`REQUIRED_SIZES`."""
    with quiet_transformers() as transformers:
        try:
            aliases = transformers.AutoConfig.for_model(raw.get("model_type")).attribute_map
            absent = [e for e in REQUIRED_SIZES if not {e, aliases.get(e), "text_config"} & set(raw)]
            if not absent:
                return transformers.AutoConfig.from_pretrained(path.parent, trust_remote_code=False).to_dict()
        except Exception as error:  # Any of a dozen kinds, by the entry at fault.
            raise InputError(f"{path}: not a configuration that transformers can read ({reason(error)})") from None
    raise InputError(f"{path}: no entry {absent[0]!r}; expected a whole number above 0")
