"""Names of pieces: placeholder until the registry is merged."""

import dataclasses
import importlib

_K = {}
_B = {"formats": {"uniform": "fqjax.core.formats.uniform", "grouped": "fqjax.core.formats.grouped"}}


def register(group):
    def deco(cls):
        _K[group, cls.kind] = cls
        return cls

    return deco


def lookup(group, kind):
    if (group, kind) not in _K and kind in _B.get(group, {}):
        importlib.import_module(_B[group][kind])
    from fqjax.runtime.errors import InputError

    if (group, kind) not in _K:
        raise InputError(f"unknown kind {kind!r} of {group}")
    return _K[group, kind]


def to_json(obj):
    return {"kind": obj.kind} | dataclasses.asdict(obj)


def from_json(group, m):
    m = dict(m)
    return lookup(group, m.pop("kind"))(**m)
