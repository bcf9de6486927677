"""Command line frame of all programs.

Each command receives its ``Config`` as first argument. An expected failure becomes one line on
stderr and an exit code. Results go to stdout, log lines to stderr. A command imports its heavy
modules inside its function, so that ``--help`` responds at once.

Exit codes: 0 done, 1 failed, 2 wrong use or configuration, 75 interrupted with the state saved,
130 stopped by Ctrl-C.
"""

from __future__ import annotations

import functools
import io
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from configs.corrupt import reason_of
from configs.errors import ConfigError, MovieNetError, error_text
from configs.one_line import printable
from configs.redaction import redact_urls
from configs.renamed import COMMANDS, OPTIONS

if TYPE_CHECKING:
    from configs.schema import Config

Command = Callable[..., int | None]

_LOWER = {
    "movienet-shard": "lower sharding.workers",
    "movienet-encode": "lower encoder.batch_size or encoder.decode_threads",
    "movienet-train": "raise training.grad_accumulation, which keeps the global batch, or lower "
    "stream.window, stream.global_batch, stream.prefetch or the sizes in model.options",
    "movienet-eval": "lower eval.batch_size or eval.windows",
}
"""What to change when a program runs out of memory."""

_EPILOG_COLUMNS = 76
"""Width of 80 columns without click's indentation of an epilog and its margin."""


class CommandGroup(click.Group):
    """Commands of one program."""

    def __init__(self, name: str, help: str) -> None:  # noqa: A002  # click's word
        super().__init__(
            name=name,
            help=help,
            context_settings={"help_option_names": ["--help"], "max_content_width": 80},
        )
        click.version_option(package_name="movienet-stream", prog_name=name)(self)
        _take_local_rank(self)

    def command(  # type: ignore[override]  # always called, with or without a name
        self, *args: Any, example: str = "", takes_run: bool = False, **kwargs: Any
    ) -> Callable[[Command], click.Command]:
        """Add a command that takes a configuration. Otherwise like ``click.Group.command``.

        Args:
            args: As for ``click.Group.command``.
            example: Options and overrides that follow ``PROGRAM COMMAND --config FILE`` in the
                example at the end of the command's help.
            takes_run: Whether the function receives the folder of a run as ``run``, None without
                one. The configuration of the run replaces a missing ``--config``.
            kwargs: As for ``click.Group.command``.
        """
        add = super().command

        def decorate(function: Command) -> click.Command:
            command = add(*args, **kwargs)(_configured(function, takes_run=takes_run))
            if not isinstance(command, click.Command):
                raise TypeError(f"got {type(command)}, want a click command")
            # Click fills arguments in order, and the overrides take all that are left.
            command.params.sort(key=lambda parameter: parameter.name == "overrides")
            command.epilog = _example(f"{self.name} {command.name} --config FILE", example)
            return command

        return decorate

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands with their complete summaries. Click would cut long ones."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [
            (name, command.get_short_help_str(limit=500))
            for name, command in commands
            if command is not None and not command.hidden
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command. Suggest the new name of a renamed one, else the nearest name."""
        import difflib

        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            if (renamed := COMMANDS.get(f"{self.name} {args[0]}")) is not None:
                words = shlex.join([*renamed.split(), *args[1:]])
                raise ConfigError(f"{self.name} {args[0]}: renamed, run `{words}`")
            commands = self.list_commands(ctx)
            near = difflib.get_close_matches(args[0], commands, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"commands: {', '.join(commands)}"
            raise ConfigError(f"{self.name}: unknown command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)


def _example(command: str, arguments: str) -> str:
    r"""Return an epilog with a command that can be pasted.

    Click does not wrap a paragraph after ``\b``. A long command continues after a backslash.
    """
    line = f"Example: {command} {arguments}".rstrip()
    if len(line) > _EPILOG_COLUMNS:
        line = f"Example: {command} \\\n    {arguments}"
    return f"\b\n{line}"


def echo(text: str = "") -> None:
    """Print a result to stdout, without secrets of URLs and control characters of names."""
    click.echo(printable(redact_urls(text), keep="\n\t"))


def run(group: CommandGroup, argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. An expected failure is printed in one line.

    Args:
        group: Commands of the program.
        argv: Arguments without the program's name; None reads those of the process.
    """
    if argv is None:
        _use_utf8()
    args = [_expand_home(arg) for arg in (sys.argv[1:] if argv is None else argv)]
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # names may be any bytes
    try:
        result = group.main(args=args, prog_name=group.name, standalone_mode=False)
    except click.NoSuchOption as error:
        renamed = OPTIONS.get(error.option_name)
        hint = f"renamed, pass {renamed}" if renamed else error.format_message()
        where = error.ctx.command_path if error.ctx else group.name
        click.echo(f"error: {where}: {error.option_name}: {hint}", err=True)
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else ""
        message = redact_urls(error.format_message())
        click.echo(f"error: {where or group.name}: {message}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped by Ctrl-C", err=True)
        return 130
    except Exception as error:
        line = _one_line(error, str(group.name))
        if line is None or "--debug" in args:
            raise
        click.echo(f"error: {line}", err=True)
        return getattr(error, "exit_code", 1)
    return result if isinstance(result, int) else 0


def want_file(_: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Check, as a callback of an option, that a file can have this name, before the work begins.

    Raises:
        ConfigError: it is a folder, or would be in a file.
    """
    if path is not None and path.is_dir():
        raise ConfigError(f"{parameter.opts[0]}: {path} is a folder, want a file")
    return path if path is None else _in_folders(path, path.parents, parameter)


def want_folder(_: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Check, as a callback of an option, that a folder can have this name, like ``want_file``.

    Raises:
        ConfigError: it is a file, or would be in a file.
    """
    return path if path is None else _in_folders(path, (path, *path.parents), parameter)


def _in_folders(path: Path, folders: Sequence[Path], parameter: click.Parameter) -> Path:
    for folder in folders:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{parameter.opts[0]}: {folder} is a file, want a folder")
    return path


def _expand_home(arg: str) -> str:
    """Expand ``~`` in ``--option=~/path``, which shells leave to the program."""
    option, equals, value = arg.partition("=")
    is_home = option.startswith("--") and value.startswith("~")
    return f"{option}{equals}{Path(value).expanduser()}" if is_home else arg


def _use_utf8() -> None:
    """Restart Python in its UTF-8 mode where the locale has another encoding.

    The id of a film is made from its name, and must be the same on a login node and in a job. The
    terminal keeps its encoding.
    """
    if sys.flags.utf8_mode or sys.getfilesystemencoding() == "utf-8":
        return
    os.environ.setdefault("PYTHONIOENCODING", f"{sys.stdout.encoding}:backslashreplace")
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])  # noqa: S606


def _one_line(error: Exception, program: str) -> str | None:
    """Return the line for an expected failure; None for a bug."""
    if isinstance(error, MovieNetError | OSError):
        return error_text(error)
    # By name: PyTorch may not be loaded. Its CPU allocator raises a plain RuntimeError.
    is_full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if is_full or "can't allocate memory" in str(error):
        return f"out of memory ({reason_of(error)}); {_LOWER.get(program, 'use a larger machine')}"
    return None


def _configured(function: Command, *, takes_run: bool) -> Command:
    """Turn ``function(config, …)`` into a function that click can call."""
    metavar = "[RUN] [KEY=VALUE]..." if takes_run else "[KEY=VALUE]..."

    @click.option(
        "--config", "config_path", metavar="FILE", help="YAML file or name of a preset, e.g. demo."
    )
    @click.option("--print-config", is_flag=True, help="Print the resolved configuration and exit.")
    @click.option("--quiet", is_flag=True, help="Log warnings only.")
    @click.option("--debug", is_flag=True, help="Log details and show full tracebacks.")
    @click.argument("overrides", nargs=-1, metavar=metavar)
    @_take_local_rank
    @functools.wraps(function)
    def wrapped(
        config_path: str | None,
        overrides: tuple[str, ...],
        print_config: bool,  # noqa: FBT001  # click passes by name
        quiet: bool,  # noqa: FBT001
        debug: bool,  # noqa: FBT001
        **options: Any,
    ) -> int | None:
        from configs.runtime.hints import remember_arguments
        from configs.runtime.logs import start_logging

        start_logging(quiet=quiet, debug=debug)
        if takes_run:
            options["run"], overrides = _split_run(overrides)
            if options["run"] is not None and config_path is None:
                config_path = str(options["run"] / "config.yaml")
        remember_arguments(config_path, overrides)
        config = _load(config_path, overrides)
        if print_config:
            from configs.load import dump_config

            echo(dump_config(config).rstrip())
            return 0
        return function(config, **options)

    return wrapped


def _set_local_rank(ctx: click.Context, parameter: click.Parameter, value: int | None) -> None:  # noqa: ARG001  # click's form
    if value is not None and not os.environ.get("LOCAL_RANK"):
        os.environ["LOCAL_RANK"] = str(value)


_take_local_rank = click.option(
    "--local-rank",
    "--local_rank",
    type=click.IntRange(0),
    hidden=True,
    help="Rank among the processes of this machine.",
    expose_value=False,
    callback=_set_local_rank,
)
"""Accept what ``torch.distributed.launch`` and ``deepspeed`` pass right after the program's name.

They set the variable LOCAL_RANK as well, which has priority.
"""


def _split_run(words: tuple[str, ...]) -> tuple[Path | None, tuple[str, ...]]:
    """Return the folder of a run among the words, None without one, and the other words."""
    runs = [
        word for word in words if Path(word).is_dir() and (Path(word) / "config.yaml").is_file()
    ]
    if len(runs) > 1:
        raise ConfigError(f"RUN: got {runs[0]} and {runs[1]}, want one run")
    named = [word for word in words if "=" not in word and word not in runs]
    if named:
        raise ConfigError(f"RUN: got {named[0]}, want the folder of a run, or KEY=VALUE")
    return (Path(runs[0]) if runs else None), tuple(word for word in words if word not in runs)


def _load(config_path: str | None, overrides: Sequence[str]) -> Config:
    from configs.load import load_config

    if config_path is None:
        raise ConfigError("--config: missing, want a YAML file or a preset, e.g. --config demo")
    return load_config(Path(config_path), overrides)
