"""Loading of one YAML file and ``key=value`` overrides into a frozen ``Config``.

An error is one line with the file, the key, the value it got and the value it wants. For a
mistyped key it suggests the nearest valid one.
"""

from __future__ import annotations

import difflib
import logging
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from configs.bounded_yaml import MAX_BYTES, BoundedLoader
from configs.corrupt import report_corrupt
from configs.errors import ConfigError
from configs.locations import expand_paths, reject_overlaps, reject_pipes, reject_urls
from configs.one_line import one_line
from configs.redaction import redact_urls
from configs.renamed import removed_key, renamed_key, without_removed_keys
from configs.schema import Config

logger = logging.getLogger(__name__)

Tree = dict[str, Any]

PRESETS = Path(__file__).parent
"""Folder of the configurations that come with the product."""


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read, override, validate and freeze a configuration.

    Args:
        path: YAML file, or the bare name of a preset such as ``demo`` or ``demo.yaml``.
        overrides: Dotted assignments such as ``training.lr=3e-4``; values are YAML.

    Raises:
        ConfigError: A file, key, type, value or combination is wrong.
    """
    path = _find(Path(path))
    tree = _read(path)
    _reject_renamed_keys(tree, str(path))
    tree, removed = without_removed_keys(tree)
    for line in removed:
        logger.warning("%s: %s", path, line)
    _reject_unknown_keys(tree, str(path))
    for override in overrides:
        _apply(tree, override)
    _keep_text(tree)
    tree = _plain(tree)
    expand_paths(tree)
    _anchor_files(tree, path.parent)
    reject_urls(tree)
    reject_pipes(tree)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_first_error(error, path, overrides)) from None
    reject_overlaps(config)
    return config


def preset_files() -> dict[str, Path]:
    """Return the files that come with the product by name: presets, launch files, towers.

    A preset is called ``demo``, a launch file of Accelerate ``accelerate/gpu``, and the OpenCLIP
    model of a preset ``towers/demo``.
    """
    patterns = ("*.yaml", "accelerate/*.yaml", "towers/*.json")
    files = [file for pattern in patterns for file in PRESETS.glob(pattern)]
    return {file.relative_to(PRESETS).with_suffix("").as_posix(): file for file in sorted(files)}


def copy_of_preset(missing: Path) -> str:
    """Return the end of a message: how to copy the model file of a preset to where it is missing.

    A copy of a preset refers to a file that was next to the original. Empty for other files.
    """
    name = f"{missing.parent.name}/{missing.stem}"
    if missing.suffix != ".json" or name not in preset_files():
        return ""
    preset = f'"$(movienet-shard presets {name})"'
    return f"; run `install -D -m 644 {preset} {shlex.quote(str(missing))}`"


def dump_config(config: Config) -> str:
    """Return the resolved configuration as YAML, for output and to be stored with results.

    Loading it gives an equal ``Config``, except that passwords and signatures of URLs are ``…``.
    """
    tree = config.model_dump(mode="json", by_alias=True)
    return yaml.safe_dump(_without_secrets(tree), sort_keys=False)


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_secrets(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    return redact_urls(value) if isinstance(value, str) else value


def reject_unknown_key(key: str, valid_keys: Collection[str], source: str) -> None:
    """Raise ``ConfigError`` if ``key`` is not in ``valid_keys``, and suggest the nearest one."""
    if key in valid_keys:
        return
    near = difflib.get_close_matches(key, valid_keys, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(sorted(valid_keys))}"
    raise ConfigError(f"{source}: unknown key {key!r}; {hint}")


def _find(path: Path) -> Path:
    preset = PRESETS / f"{path.name.removesuffix('.yaml')}.yaml"
    if path.is_file():
        return path
    if path.parent == Path() and preset.is_file():
        return preset
    near = difflib.get_close_matches(path.stem, _presets(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"presets: {', '.join(_presets())}"
    raise ConfigError(f"--config: no file {str(path)!r}; {hint}")


def _presets() -> list[str]:
    return sorted(file.stem for file in PRESETS.glob("*.yaml"))


class _Loader(BoundedLoader):
    """YAML loader in which ``3e-4`` is a number, ``off`` is text and a repeated key an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:  # noqa: FBT001, FBT002  # PyYAML's signature
        keys: set[object] = set()
        where = f"in the section at line {node.start_mark.line + 1}"
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"got a list or section as a key {where}, want text")
            name = self.construct_object(key, deep=True)
            if name in keys:
                raise ConfigError(f"key {str(name)!r} appears twice {where}")
            keys.add(name)
        return super().construct_mapping(node, deep)


class _Integer(int):
    """Integer that remembers its text, for keys that take text: a run may be called 007."""

    text: str


class _Real(float):
    """Like ``_Integer``; some git hashes are numbers, e.g. 1234e56."""

    text: str


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> _Integer:
    number = _Integer(loader.construct_yaml_int(node))
    number.text = loader.construct_scalar(node)
    return number


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> _Real:
    number = _Real(loader.construct_yaml_float(node))
    number.text = loader.construct_scalar(node)
    return number


def _float_like(text: str) -> float | str:
    try:
        number = _Real(text)
    except ValueError:
        return text
    number.text = text
    return number


def _construct_str(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float | str:
    # YAML 1.1 reads 3e-4 as a string, but users mean the number. Quoted text stays text.
    text: str = loader.construct_scalar(node)
    plain = node.style is None and text[:1] in "+-.0123456789"
    return _float_like(text) if plain else text


_Loader.add_constructor("tag:yaml.org,2002:str", _construct_str)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)

# YAML 1.1 reads off, no, on and yes as booleans, but users mean the words: tracking.wandb=off.
# Dates are names: encoder.name=2026-11-25.
_NO_TEXT = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, rule) for tag, rule in rules if tag not in _NO_TEXT]
    for letter, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF")
)


def _parse(text: str, source: str) -> Any:
    with report_corrupt(source, "want YAML", ConfigError):
        try:
            return yaml.load(text, Loader=_Loader)  # noqa: S506  # a SafeLoader
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{source}: not YAML: {_without_excerpt(error)}") from None


def _without_excerpt(error: yaml.YAMLError) -> str:
    """Return the message without the excerpt of the file, whose caret needs a line of its own."""
    for mark in ("context_mark", "problem_mark"):
        if getattr(error, mark, None) is not None:
            getattr(error, mark).buffer = None
    return one_line(str(error)).replace('in "<unicode string>", ', "at ")


def _read(path: Path) -> Tree:
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ConfigError(f"{path}: got {size:,} bytes, want at most {MAX_BYTES:,} of YAML")
    try:
        tree = _parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: got {type(tree).__name__}, want sections such as 'data:'")
    return tree


def _reject_renamed_keys(tree: Tree, source: str) -> None:
    """Report all renamed keys of a file in one error, so that one edit corrects them."""
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
            reject_unknown_key(str(key), _keys(model), where)


def _sections(
    tree: Tree, model: type[BaseModel], where: str
) -> Iterator[tuple[Tree, type[BaseModel], str]]:
    yield tree, model, where
    for key, value in tree.items():
        subsection = _section_model(_keys(model).get(str(key)))
        if subsection is None:
            continue
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: {key}: got {value!r}, want a section of keys")
        yield from _sections(value, subsection, f"{where} [{key}]")


def _keys(model: type[BaseModel]) -> Mapping[str, FieldInfo]:
    """Return the fields of a section by their name in YAML."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _section_model(field: FieldInfo | None) -> type[BaseModel] | None:
    """Return the class of a section; None for a key with a value."""
    annotation = field.annotation if field else None
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


def _apply(tree: Tree, override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r}: want KEY=VALUE, e.g. training.lr=3e-4")
    value = _parse(text, f"override {override!r}")
    if (renamed := renamed_key(dotted, value)) is not None:
        raise ConfigError(f"override {override!r}: renamed, change to the new name: {renamed}")
    if (removed := removed_key(dotted)) is not None:
        raise ConfigError(f"override {override!r}: {removed}")
    model: type[BaseModel] | None = Config
    *parents, last = dotted.split(".")
    for key in parents:
        model = _step(model, key, override)
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {override!r}: {key!r} is a value, not a section")
    if model is not None:  # a free mapping such as model.options accepts any key
        reject_unknown_key(last, _keys(model), f"override {override!r}")
        if _section_model(_keys(model)[last]) is not None:
            raise ConfigError(f"override {override!r}: {last!r} is a section, want {dotted}.KEY=…")
    tree[last] = value


def _step(model: type[BaseModel] | None, key: str, override: str) -> type[BaseModel] | None:
    if model is None:
        return None
    reject_unknown_key(key, _keys(model), f"override {override!r}")
    subsection = _section_model(_keys(model)[key])
    if subsection is None and _keys(model)[key].annotation != dict[str, Any]:
        raise ConfigError(f"override {override!r}: {key!r} is a value, not a section")
    return subsection


def _keep_text(tree: Tree) -> None:
    """Restore the text of numbers under keys that take text, e.g. names and ids."""
    for section, model, _ in _sections(tree, Config, ""):
        for key, field in _keys(model).items():
            value = section.get(key)
            options = tuple(_types(field.annotation))
            takes_names = tuple[str, ...] in options
            if isinstance(value, list) and takes_names:
                section[key] = [getattr(item, "text", item) for item in value]
            elif key in section and (str in options or (takes_names and int not in options)):
                section[key] = getattr(value, "text", value)


def _types(annotation: Any) -> Iterator[Any]:
    """Yield a type, or those of ``A | B`` and ``Annotated[A, …]``."""
    yield annotation
    if get_origin(annotation) is not tuple:
        for option in get_args(annotation):
            yield from _types(option)


def _plain(value: Any) -> Any:
    """Return a tree with numbers of Python's own types."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, _Integer):
        return int(value)
    return float(value) if isinstance(value, _Real) else value


def _anchor_files(tree: Tree, folder: Path) -> None:
    """Make the paths of files that belong to the config absolute: user code, JSON, prompts.

    They are written relative to the config file, but the resolved copy is stored in the run's
    folder and must find them as well.
    """
    for section, key in (("model", "class"), ("training", "loss"), ("encoder", "model")):
        value = tree.get(section, {}).get(key)
        if isinstance(value, str) and (".py:" in value or value.endswith(".json")):
            tree[section][key] = str((folder / value).resolve())
    for section, key in (("eval", "prompts"), ("slurm", "site")):
        if isinstance(path := tree.get(section, {}).get(key), str):
            tree[section][key] = str((folder / path).resolve())


def _first_error(error: ValidationError, path: Path, overrides: Sequence[str]) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(place) for place in first["loc"])
    # A validator's own message already has the form "got …, want …".
    message = first["msg"].removeprefix("Value error, ")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if not key:
        return f"{path}: {message}{more}"
    if first["type"] == "missing":
        message = "missing, want a value"
    elif not message.startswith("got "):
        message = f"got {first['input']!r}, want {_expectation(message)}"
    return f"{_origin(key, path, overrides)}: {key}: {message}{more}"


def _origin(key: str, path: Path, overrides: Sequence[str]) -> str:
    """Return where a key got its value: its last override, else the file."""
    for override in reversed(overrides):
        if f"{key}.".startswith(f"{override.partition('=')[0]}."):
            return f"override {override!r}"
    return str(path)


def _expectation(message: str) -> str:
    """Shorten pydantic's message: ``a valid number, unable to …`` becomes ``a number``."""
    expected = message.removeprefix("Input should be ")
    if not expected.startswith("a valid "):
        return expected
    noun = expected.removeprefix("a valid ").partition(",")[0]
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
