"""From flags, environment and a TOML file to one checked `Config`: `load`.

    --port 8080 ─▶ HEADRACE_PORT=8080 ─▶ port = 8080 in the file ─▶ default        the first that is given wins

The names and types of settings come from the schema alone, so that the three ways cannot drift apart. Every error is one line that
says where the value came from, what it is, and what is allowed.
"""

import argparse
import difflib
import math
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect

from headrace.engine.config import Config
from headrace.engine.errors import UserError
from headrace.engine.names import LISTEN, port_of
from headrace.engine.sizes import parse_size

PREFIX = "HEADRACE_"
SECRETS = ("api_key", "admin_key")
"""Settings whose values are never shown."""
FILE_VARIABLE = "HEADRACE_CONFIG"
YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class Setting(msgspec.Struct, frozen=True):
    """One field of the schema, as the three sources need it."""

    name: str
    kind: inspect.Type
    optional: bool
    default: object
    description: str
    metavar: str | None

    @property
    def flag(self) -> str:
        return "MODEL" if self.name == "model" else "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()

    def allowed(self) -> str:
        """What a value may be, in words."""
        kind = self.kind
        if isinstance(kind, inspect.LiteralType):
            return "one of " + ", ".join(map(str, kind.values))
        if isinstance(kind, inspect.BoolType):
            return "true or false"
        if isinstance(kind, inspect.IntType | inspect.FloatType):
            noun = "an integer" if isinstance(kind, inspect.IntType) else "a number"
            if self.name == "page_size":
                noun = "a power of two"
            # Bounds that only keep a number representable are said when they are hit, not before.
            return noun + (f" from {kind.ge} to {kind.le}" if kind.le is not None and kind.le < 1e9 else f" of at least {kind.ge}")
        shapes = {"kv_memory": 'a size such as "2GiB"', "listen": "an address such as tcp://10.0.0.1:5700"}
        return shapes.get(self.name, "text")


def _settings() -> dict[str, Setting]:
    found = {}
    for field in inspect.type_info(Config).fields:  # type: ignore[union-attr]
        assert isinstance(field.type, inspect.Metadata)
        kind, about = field.type.type, field.type
        optional = isinstance(kind, inspect.UnionType)
        if isinstance(kind, inspect.UnionType):
            kind = next(one for one in kind.types if not isinstance(one, inspect.NoneType))
        description = (about.extra_json_schema or {})["description"]
        found[field.name] = Setting(field.name, kind, optional, field.default, description, (about.extra or {})["metavar"])
    return found


SETTINGS = _settings()


def add_arguments(parser: argparse.ArgumentParser, names: Collection[str] | None = None) -> None:
    """Add every setting (or those of `names`), and `--config`, as flags. What is not given is absent from the namespace."""
    parser.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=f"TOML file of settings (or {FILE_VARIABLE})")
    for setting in SETTINGS.values():
        if names is not None and setting.name not in names:
            continue
        text = setting.description.replace("%", "%%")
        if not setting.optional:
            shown = str(setting.default).lower() if isinstance(setting.default, bool) else setting.default
            text += f" (default: {shown})"
        if setting.name == "model":
            parser.add_argument("model", nargs="?", metavar="MODEL", default=argparse.SUPPRESS, help=text)
        elif isinstance(setting.kind, inspect.BoolType):
            parser.add_argument(setting.flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            choices = setting.kind.values if isinstance(setting.kind, inspect.LiteralType) else None
            shape = "|".join(str(value) for value in choices) if choices else setting.metavar or "N"
            parser.add_argument(setting.flag, metavar=shape, default=argparse.SUPPRESS, help=text)


def load(flags: Mapping[str, Any], environ: Mapping[str, str], path: str | Path | None = None) -> Config:
    """The settings of one engine. `flags` holds what the command line gave, by setting; `path` is the file of `--config`.

    An empty environment variable counts as absent. Raises UserError.
    """
    _check_variables(environ)
    path = path or environ.get(FILE_VARIABLE) or None
    values = {} if path is None else _read_file(Path(path).expanduser())
    for setting in SETTINGS.values():
        if text := environ.get(setting.variable):
            values[setting.name] = _from_text(setting, text, f"{setting.variable}={_shown(setting, text)}")
    for name, value in flags.items():
        setting = SETTINGS[name]
        where = setting.flag if isinstance(value, bool) else f"{setting.flag} {_shown(setting, value)}"
        values[name] = value if isinstance(value, bool) else _from_text(setting, value, where)
    return _fitting(Config(**values))


def _fitting(config: Config) -> Config:
    """The same, or UserError where settings do not go together."""
    if config.listen and not config.keys:
        raise UserError(f"listen={config.listen} needs keys: make some with `headrace keys DIR NAME`, and name the folder with --keys DIR")
    if config.keys and not config.listen:
        raise UserError(f"keys={config.keys} is of no use without listen: say where, with --listen tcp://HOST:PORT")
    if config.listen and port_of(config.listen) + config.tokenizers - 1 > 65535:
        raise UserError(f"listen={config.listen} leaves no ports for {config.tokenizers} tokenizers: name a lower one")
    return config


def _check_variables(environ: Mapping[str, str]) -> None:
    known = {FILE_VARIABLE, *(setting.variable for setting in SETTINGS.values())}
    for name in environ:
        # A name far from every setting belongs to somebody else.
        if name.startswith(PREFIX) and name not in known and (close := difflib.get_close_matches(name, known, 1, 0.85)):
            raise UserError(f"{name} is no setting: did you mean {close[0]}?")


def _read_file(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the configuration file {path}: {error.strerror or error}") from None
    except ValueError as error:  # Of TOML's grammar, or of UTF-8.
        raise UserError(f"{path} is not a TOML file: {error}") from None
    values = {}
    for key, value in table.items():
        setting = SETTINGS.get(key)
        if setting is None:
            close = difflib.get_close_matches(key.replace("-", "_").lower(), SETTINGS, 1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(SETTINGS)}"
            raise UserError(f"{path}: {key} is no setting: {hint}")
        values[key] = _checked(setting, value, f"{path}: {key} = {_shown(setting, value)}")
    return values


def _shown(setting: Setting, value: object) -> str:
    """A value in an error message."""
    if setting.name in SECRETS:
        return "(hidden)"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else text[:79] + "…"


def _from_text(setting: Setting, text: str, where: str) -> Any:
    kind = setting.kind
    value: Any = text
    try:
        if isinstance(kind, inspect.IntType):
            value = int(text)
        elif isinstance(kind, inspect.FloatType):
            value = float(text)
        elif isinstance(kind, inspect.BoolType):
            value = {**dict.fromkeys(YES, True), **dict.fromkeys(NO, False)}[text.strip().lower()]
    except (ValueError, KeyError):
        raise UserError(f"{where}: expected {setting.allowed()}") from None
    return _checked(setting, value, where)


def _checked(setting: Setting, value: Any, where: str) -> Any:
    """`value` in its setting's type and range, or UserError."""
    kind = setting.kind
    wrong = UserError(f"{where}: expected {setting.allowed()}")
    if isinstance(kind, inspect.BoolType):
        if type(value) is not bool:
            raise wrong
    elif isinstance(kind, inspect.IntType | inspect.FloatType):
        if type(value) is not int and not (isinstance(kind, inspect.FloatType) and type(value) is float and math.isfinite(value)):
            raise wrong
        if kind.ge is not None and value < kind.ge:
            raise wrong
        if kind.le is not None and value > kind.le:
            raise wrong if kind.le < 1e9 else UserError(f"{where}: expected at most {kind.le:g}")
        if setting.name == "page_size" and int(value).bit_count() != 1:
            raise wrong
        if setting.name == "tensor_parallel" and value > 1:
            raise UserError(f"{where}: tensor_parallel={value} is not built yet; leave it at 1")
        value = float(value) if isinstance(kind, inspect.FloatType) else value
    elif isinstance(kind, inspect.LiteralType):
        if value not in kind.values:
            raise wrong
    elif type(value) is not str or not value.strip():
        raise wrong
    elif setting.name == "listen":
        if not LISTEN.fullmatch(value) or port_of(value) > 65535:
            raise wrong
    elif setting.name == "kv_memory":
        try:
            parse_size(value)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return value
