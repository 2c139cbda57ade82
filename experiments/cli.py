"""What every command shares: flags, help, configs, exit codes, and the JSON report.

Exit codes: 0 done, already done, or help; 2 a mistake of the user's, in one line on stderr; 3 diverged; 130 or 143 stopped
by Ctrl-C, or by SIGTERM or a time budget, with the state saved; 1 anything else.
"""

import argparse
import ast
import contextlib
import difflib
import errno
import json
import os
import pathlib
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from ml_collections import ConfigDict

import configs
from gptjax import platform

CONFIGS = pathlib.Path(configs.__file__).parent
USER_ERROR, DIVERGED = 2, 3
_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a text", tuple: "a tuple of Python's"}


class UserError(Exception):
    """A mistake of the user's; its message is the one line they see."""


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Within it, what the library refuses is the user's mistake, not ours."""
    try:
        yield
    except (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise UserError(str(error)) from error


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which takes `--config FILE` with overrides of its fields.

    Args:
      doc: the command's module docstring, shown by --help.
      config: whether the command takes a config.
    """

    def __init__(self, doc: str, *, config: bool = False):
        super().__init__(description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.takes_config = config
        if config:
            self.add_argument("--config", metavar="FILE", help="a file of configs/ (required)")
        self.add_argument("--json", metavar="FILE", help="write command, versions, device, seeds and metrics to it")

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage."""
        raise UserError(f"{message}; --help lists all flags")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses `argv`; with a config, the result's `config` is the locked ConfigDict, overrides applied.

        Its `config_flags` are the flags that gave it, for a command that starts others.

        Raises:
          UserError: anything wrong with the command line.
          SystemExit: code 0, after --help.
        """
        if not self.takes_config:
            return self.parse_args(argv)
        overrides, rest = _split_overrides(argv)
        if "-h" in rest or "--help" in rest:
            known, _ = argparse.ArgumentParser.parse_known_args(self, [a for a in rest if a not in ("-h", "--help")])
            config = load_config(known.config or "configs/default.py", overrides)
            self.epilog = _describe_fields(config, known.config or "configs/default.py")
        arguments = self.parse_args(rest)
        if arguments.config is None:
            self.error("--config FILE is required")
        arguments.config_flags = ["--config", arguments.config, *(f"--config.{n}={text}" for n, text in overrides)]
        arguments.config = load_config(arguments.config, overrides)
        return arguments


def run(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Calls `main` with the command line and exits with its code, translating errors into the contract above."""
    platform.restart_with_malloc_settings()
    sys.exit(exit_code(lambda: main(sys.argv[1:])))


def exit_code(main: Callable[[], int]) -> int:
    """Calls `main` and returns its code, or that of the error it raises, after a line on stderr."""
    try:
        code = main()
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read what was printed has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        print(f"error: {error}; the last good checkpoint is intact", file=sys.stderr)
        return 1


def load_config(path: str, overrides: Sequence[tuple[str, str]] = ()) -> ConfigDict:
    """Runs a config file and applies overrides to it.

    Args:
      path: a file with `get_config()`; a relative one is also looked for beside the installed `configs/`.
      overrides: (dotted field, text) pairs.

    Raises:
      UserError: no such file, an unknown field, or text that is not of the field's type.
    """
    shipped = sorted(f"configs/{p.name}" for p in CONFIGS.glob("*.py") if p.stem not in ("__init__", "default"))
    config = function_of("--config", path, "get_config", f"; there are {', '.join(shipped)}")()
    fields = flatten(config)
    for name, text in overrides:
        if name not in fields:
            raise UserError(unknown_field(name, fields))
        section, _, leaf = name.rpartition(".")
        (config[section] if section else config)[leaf] = _parse_value(name, text, fields[name])
    return config.lock()


def function_of(flag: str, path: str, name: str, hint: str = "") -> Callable[..., Any]:
    """The function that a Python file, which a flag named, defines; the file may also lie beside the installed `configs/`.

    Raises:
      UserError: no such file, followed by `hint`; no such function, or a file that is not Python.
    """
    file = next((p for p in (pathlib.Path(path), CONFIGS.parent / path) if p.is_file()), None)
    if file is None:
        raise UserError(f"{flag} {path}: no such file{hint}")
    try:
        return runpy.run_path(str(file))[name]
    except SyntaxError as error:
        raise UserError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    except KeyError as error:
        if error.args != (name,):
            raise
        raise UserError(f"{flag} {path}: it has no function {name}()") from error


def unknown_field(name: str, fields: dict[str, Any]) -> str:
    """What to say of a field that is not one, with the nearest that is."""
    near = difflib.get_close_matches(name, fields, n=1) or difflib.get_close_matches(
        name.split(".")[-1], [field.split(".")[-1] for field in fields], n=1
    )
    near = [field for field in fields if near and (field == near[0] or field.endswith("." + near[0]))]
    hint = f"; did you mean config.{near[0]}?" if near else "; --help lists all fields"
    if any(field.startswith(name + ".") for field in fields):
        hint = f"; it is a section, set its fields as in --config.{name}.FIELD=VALUE"
    return f"unknown config field config.{name}{hint}"


def check_type(name: str, value: Any, default: Any) -> None:
    """Refuses a value that is not of the field's type; a whole number will do for a number.

    Raises:
      UserError: names the field, the value and the type.
    """
    allowed = {float: (float, int), tuple: (tuple, list)}.get(type(default), (type(default),))
    if not isinstance(value, allowed) or (isinstance(value, bool) and not isinstance(default, bool)):
        raise UserError(f"config.{name}={value!r} is not {_KINDS[type(default)]}")


def flatten(config: ConfigDict) -> dict[str, Any]:
    """The fields of a config by dotted name."""
    return {
        f"{section}.{name}" if isinstance(value, ConfigDict) else section: leaf
        for section, value in config.items()
        for name, leaf in (value.items() if isinstance(value, ConfigDict) else [("", value)])
    }


def _parse_value(name: str, text: str, default: Any) -> Any:
    try:
        if isinstance(default, tuple):
            return tuple(ast.literal_eval(text))
        if isinstance(default, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return type(default)(text)
    except (KeyError, ValueError, TypeError, SyntaxError) as error:
        raise UserError(f"config.{name}={text!r} is not {_KINDS[type(default)]}") from error


def _split_overrides(argv: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Takes `--config.a.b=value` and `--config.a.b value` out of a command line."""
    overrides, rest = [], []
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        name, equals, text = argument.removeprefix("--config.").partition("=")
        if not equals:
            text = next(arguments, "--")
            if text.startswith("--"):
                raise UserError(f"--config.{name} needs a value, as in --config.{name}=VALUE")
        overrides.append((name, text))
    return overrides, rest


def _describe_fields(config: ConfigDict, path: str) -> str:
    comments = field_comments()
    lines = [f"config fields, as --config.section.field=value (shown with the values of {path}):"]
    lines += [f"  {f'{name}={value}':<40} {comments[name]}" for name, value in flatten(config).items()]
    return "\n".join(lines).replace("%", "%%")


def field_comments() -> dict[str, str]:
    """The meaning of each config field, from its comment in configs/default.py."""
    pattern = re.compile(r"^ +config\.([\w.]+) = .*?  # (.*)$", re.MULTILINE)
    return dict(pattern.findall((CONFIGS / "default.py").read_text()))


def write_report(path: str | None, environment: dict[str, Any], seeds: list[int], metrics: dict[str, Any]) -> None:
    """Writes the JSON report of `--json`; nothing if `path` is None."""
    if path is not None:
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        report = {"command": shlex.join(sys.orig_argv), **environment, "seeds": seeds, "metrics": numbers}
        pathlib.Path(path).write_text(json.dumps(report, indent=2) + "\n")
