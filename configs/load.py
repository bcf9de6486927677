"""One YAML file and ``key=value`` overrides become one frozen ``Config``, or one clear line.

A line of complaint names the file, the key, what was got and what is wanted; a mistyped key gets
the nearest valid one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from configs.errors import ConfigError
from configs.renamed import renamed_key
from configs.schema import Config

Tree = dict[str, Any]

PRESETS = Path(__file__).parent
"""Where the configurations lie that come with the product."""


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read, override, check and freeze a configuration.

    Args:
        path: YAML file, or the bare name of a preset such as ``demo``.
        overrides: Dotted assignments such as ``training.lr=3e-4``; values are YAML.

    Raises:
        ConfigError: a file, key, type, value or combination is wrong; one line says which.
    """
    path = _find(Path(path))
    tree = _read(path)
    _reject_renamed_keys(tree, str(path))
    _reject_unknown_keys(tree, str(path))
    for override in overrides:
        _apply(tree, override)
    _anchor_files(tree, path.parent)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_first_complaint(error, path, overrides)) from None


def dump_config(config: Config) -> str:
    """Return the resolved configuration as YAML; loading it gives an equal ``Config``."""
    tree = config.model_dump(mode="json", by_alias=True)
    return yaml.safe_dump(tree, sort_keys=False)


def reject_unknown_key(key: str, known: Collection[str], source: str) -> None:
    """Raise ``ConfigError`` if ``key`` is not in ``known``; propose the nearest one."""
    if key in known:
        return
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
    raise ConfigError(f"{source}: unknown key {key!r}; {hint}")


def _find(path: Path) -> Path:
    preset = PRESETS / f"{path.name}.yaml"
    if path.is_file():
        return path
    if path.parent == Path() and preset.is_file():
        return preset
    near = difflib.get_close_matches(path.stem, _presets(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"presets: {', '.join(_presets())}"
    raise ConfigError(f"--config: no file {str(path)!r}; {hint}")


def _presets() -> list[str]:
    return sorted(file.stem for file in PRESETS.glob("*.yaml"))


class _Loader(yaml.SafeLoader):
    """YAML in which ``3e-4`` is a number, ``off`` a word, and a key said twice an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:  # noqa: FBT001, FBT002  # PyYAML's signature
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            line = node.start_mark.line + 1
            raise ConfigError(f"key {str(twice)!r} stands twice in the section at line {line}")
        return super().construct_mapping(node, deep)


def _float_like(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _construct_str(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float | str:
    # YAML 1.1 takes 3e-4 for a string; people mean the number. Quoted text stays text.
    text: str = loader.construct_scalar(node)
    plain = node.style is None and text[:1] in "+-.0123456789"
    return _float_like(text) if plain else text


_Loader.add_constructor("tag:yaml.org,2002:str", _construct_str)

# YAML 1.1 takes off, no, on and yes for booleans; people mean the words: tracking.wandb=off.
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, rule) for tag, rule in rules if tag != "tag:yaml.org,2002:bool"]
    for letter, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF")
)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  # a SafeLoader
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not YAML: {' '.join(str(error).split())}") from None


def _read(path: Path) -> Tree:
    try:
        tree = _parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: got {type(tree).__name__}, want sections such as 'data:'")
    return tree


def _reject_renamed_keys(tree: Tree, source: str) -> None:
    """Name every renamed key of a file at once, so that it is corrected in one go."""
    renamed = [
        line
        for section, keys in tree.items()
        if isinstance(keys, dict)
        for key, value in keys.items()
        if (line := renamed_key(f"{section}.{key}", value)) is not None
    ]
    if renamed:
        raise ConfigError(f"{source}: renamed, change to the new names: {', '.join(renamed)}")


def _reject_unknown_keys(tree: Tree, source: str) -> None:
    for section, model, where in _sections(tree, Config, source):
        for key in section:
            reject_unknown_key(str(key), _known(model), where)


def _sections(
    tree: Tree, model: type[BaseModel], where: str
) -> Iterator[tuple[Tree, type[BaseModel], str]]:
    yield tree, model, where
    for key, value in tree.items():
        below = _section_model(_known(model).get(str(key)))
        if below is None:
            continue
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: {key}: got {value!r}, want a section of keys")
        yield from _sections(value, below, f"{where} [{key}]")


def _known(model: type[BaseModel]) -> Mapping[str, FieldInfo]:
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _section_model(field: FieldInfo | None) -> type[BaseModel] | None:
    kind = field.annotation if field else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _apply(tree: Tree, override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r}: want KEY=VALUE, e.g. training.lr=3e-4")
    value = _parse(text, f"override {override!r}")
    if (renamed := renamed_key(dotted, value)) is not None:
        raise ConfigError(f"override {override!r}: renamed, change to the new name: {renamed}")
    model: type[BaseModel] | None = Config
    *parents, last = dotted.split(".")
    for key in parents:
        model = _step(model, key, override)
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {override!r}: {key!r} is a value, not a section")
    if model is not None:  # below a free mapping such as model.options any key will do
        reject_unknown_key(last, _known(model), f"override {override!r}")
        if _section_model(_known(model)[last]) is not None:
            raise ConfigError(f"override {override!r}: {last!r} is a section, want {dotted}.KEY=…")
    tree[last] = value


def _step(model: type[BaseModel] | None, key: str, override: str) -> type[BaseModel] | None:
    if model is None:
        return None
    reject_unknown_key(key, _known(model), f"override {override!r}")
    below = _section_model(_known(model)[key])
    if below is None and _known(model)[key].annotation != dict[str, Any]:
        raise ConfigError(f"override {override!r}: {key!r} is a value, not a section")
    return below


def _anchor_files(tree: Tree, folder: Path) -> None:
    """Make the files that belong to the config absolute: classes, losses and an encoder's JSON.

    They are written relative to the config file; the resolved copy with the run must find them too.
    """
    for section, key in (("model", "class"), ("training", "loss"), ("encoder", "model")):
        value = tree.get(section, {}).get(key)
        if isinstance(value, str) and (".py:" in value or value.endswith(".json")):
            tree[section][key] = str((folder / value).resolve())


def _first_complaint(error: ValidationError, path: Path, overrides: Sequence[str]) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(place) for place in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if not key:
        return f"{path}: {message}{more}"
    if first["type"] == "missing":
        message = "missing, want a value"
    elif not message.startswith("got "):
        message = f"got {first['input']!r}, want {_wanted(message)}"
    return f"{_said_by(key, path, overrides)}: {key}: {message}{more}"


def _said_by(key: str, path: Path, overrides: Sequence[str]) -> str:
    """Return who gave a key its value: the last override of it, else the file."""
    for override in reversed(overrides):
        if f"{key}.".startswith(f"{override.partition('=')[0]}."):
            return f"override {override!r}"
    return str(path)


def _wanted(message: str) -> str:
    """Return what pydantic wants in our words: ``a number`` for ``a valid number, unable to …``."""
    want = message.removeprefix("Input should be ")
    if not want.startswith("a valid "):
        return want
    kind = want.removeprefix("a valid ").partition(",")[0]
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
