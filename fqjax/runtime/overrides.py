"""``KEY=VALUE`` settings: composed configurations with some fields changed.

A key is the name of a field, of the configuration or of one of its parts; dotted, from the outermost part on, where two parts
have a field of the name.  A field that holds one of several kinds of parts takes the name of the kind; what the kinds have in
common is kept.
"""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from fqjax.runtime.errors import InputError
from fqjax.runtime.names import did_you_mean
from fqjax.runtime.settings import Settings, alternatives, check_field, hints_of

SettingsT = TypeVar("SettingsT", bound=Settings)


class _Draft:
    """A configuration whose fields may be changed one after the other before they are checked together."""

    def __init__(self, config: Settings):
        self.cls: type[Settings] = type(config)
        self.values: dict[str, object] = {name: getattr(config, name) for name in hints_of(self.cls)}
        self.values = {name: _Draft(v) if isinstance(v, Settings) else v for name, v in self.values.items()}

    def become(self, cls: type[Settings]) -> None:
        """Makes it one of another kind."""
        self.cls, self.values = cls, {name: v for name, v in self.values.items() if name in hints_of(cls)}

    def made(self) -> Settings:
        return self.cls(**{name: v.made() if isinstance(v, _Draft) else v for name, v in self.values.items()})

    def keys(self) -> Iterator[tuple[str, "_Draft", str]]:
        """Every key in full, with the part that it belongs to and the name of its field."""
        for name, hint in hints_of(self.cls).items():
            inner, kinds = self.values.get(name), alternatives(hint)[0]
            if name not in self.cls.fixed and len(kinds) != 1:
                yield name, self, name
            if isinstance(inner, _Draft):
                yield from ((f"{name}.{key}", part, field) for key, part, field in inner.keys())


def overridden(config: SettingsT, settings: Iterable[str], label: str, aliases: Iterable[str] = ()) -> SettingsT:
    """The configuration with settings applied.

    Args:
      config: to start from; it is not changed.
      settings: ``KEY=VALUE`` each.
      label: of the configuration, for messages.
      aliases: keys that the caller takes itself, for the list of those that there are.

    Raises:
      InputError: naming the key or value that does not fit, the setting that has no effect, or the key that is set twice.
    """
    draft, pairs = _Draft(config), [split(setting) for setting in settings]
    idle, given = dict[str, str](), dict[str, str]()
    # Kinds of parts first, as they decide which keys there are.
    for key, text in sorted(pairs, key=lambda pair: not _is_kind(draft, pair[0])):
        try:
            full, part, name = _found(draft, key, aliases)
        except InputError as error:
            raise InputError(f"--set {key}={text}: {label} {error}") from None
        if full in given:
            raise InputError(f"--set {key}={text}: {given[full]} sets the same; expected one of them")
        given[full] = f"{key}={text}"
        before = part.values.get(name)
        _change(part, name, text)
        if part.values.get(name) == before:  # A value that has no effect may be taken back, but not be given again.
            idle[full] = f"{key}={text}"
    made = draft.made()
    assert isinstance(made, type(config))  # Only parts change their kind.
    for key, reason in _all_unused(made):
        if key in idle:
            raise InputError(f"--set {idle[key]}: {reason}")
    return made


def split(setting: str) -> tuple[str, str]:
    """Key and value of a setting."""
    key, separator, text = setting.partition("=")
    if not separator:
        raise InputError(f"--set {setting}: expected KEY=VALUE")
    return key, text


def keys_of(config: Settings) -> list[str]:
    """The keys that a configuration has, each as short as it may be."""
    return _shortest(_Draft(config))


def _shortest(draft: _Draft) -> list[str]:
    full = [key for key, _, _ in draft.keys()]
    last = [key.rpartition(".")[2] for key in full]
    return [short if last.count(short) == 1 else key for key, short in zip(full, last, strict=True)]


def _matching(draft: _Draft, key: str) -> list[tuple[str, _Draft, str]]:
    every = list(draft.keys())
    exact = [found for found in every if found[0] == key]
    return exact or [found for found in every if f".{found[0]}".endswith(f".{key}")]


def _is_kind(draft: _Draft, key: str) -> bool:
    """Whether a setting chooses the kind of a part."""
    return any(isinstance(part.values.get(name), _Draft) for _, part, name in _matching(draft, key))


def _found(draft: _Draft, key: str, aliases: Iterable[str]) -> tuple[str, _Draft, str]:
    found = _matching(draft, key)
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"has several settings {key!r}; expected one of {', '.join(full for full, _, _ in found)}")
    known = [*_shortest(draft), *aliases]
    settings = f"has no setting {key!r}; its settings are: {', '.join(known)}"
    raise InputError("; ".join([settings, *did_you_mean(key, known)]))


def _change(part: _Draft, name: str, text: str) -> None:
    """Gives a field the value that a text stands for."""
    hint, inner = hints_of(part.cls)[name], part.values.get(name)
    if isinstance(inner, _Draft):
        kinds = {getattr(cls, "kind", cls.__name__): cls for cls in alternatives(hint)[0]}
        if text not in kinds:
            raise InputError("; ".join([f"{name}={text}: expected {' or '.join(kinds)}", *did_you_mean(text, kinds)]))
        inner.become(kinds[text])
    else:
        part.values[name] = _parsed(hint, text, name)


def _parsed(hint: object, text: str, name: str) -> object:
    """The first reading of a text that the hint admits."""
    for value in _readings(text):
        try:
            return check_field(hint, value, name)
        except InputError:
            continue
    number = next((value for value in _readings(text) if type(value) in (int, float)), text)
    return check_field(hint, number, name)  # Refuses it.


def _readings(text: str) -> Iterator[bool | int | float | str | None]:
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        yield words[text.lower()]
    for kind in (int, float) if text.isascii() else ():  # Python takes the digits of other scripts too.
        try:
            yield kind(text)
        except ValueError:
            continue
    yield text


def _all_unused(config: Settings) -> Iterator[tuple[str, str]]:
    yield from config.unused()
    for name in hints_of(type(config)):
        inner = getattr(config, name)
        if isinstance(inner, Settings):
            yield from ((f"{name}.{key}", reason) for key, reason in _all_unused(inner))
