"""One command frame for all rooms.

Each command gets its ``Config`` first. Expected failures become one line on stderr and an exit
code; results go to stdout, news to stderr. What a command needs is imported inside it, so that
``--help`` answers at once.

Exit codes: 0 done, 1 failed, 2 wrong use or configuration, 75 interrupted with the state saved,
130 stopped from the keyboard.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from configs.errors import ConfigError, MovieNetError
from configs.renamed import COMMANDS, OPTIONS

if TYPE_CHECKING:
    from configs.schema import Config

Command = Callable[..., int | None]


class CommandGroup(click.Group):
    """The commands of one room."""

    def __init__(self, name: str, help: str) -> None:  # noqa: A002  # click's word
        super().__init__(
            name=name,
            help=help,
            context_settings={"help_option_names": ["--help"], "max_content_width": 80},
        )
        click.version_option(package_name="movienet-stream", prog_name=name)(self)

    def command(  # type: ignore[override]  # always called, with or without a name
        self, *args: Any, example: str = "", **kwargs: Any
    ) -> Callable[[Command], click.Command]:
        """Add a command that takes a configuration; as ``click.Group.command`` otherwise.

        Args:
            args: As for ``click.Group.command``.
            example: Options and overrides of an example, shown at the end of the command's help.
            kwargs: As for ``click.Group.command``.
        """
        add = super().command

        def decorate(function: Command) -> click.Command:
            made = add(*args, **kwargs)(_configured(function))
            if not isinstance(made, click.Command):
                raise TypeError(f"got {type(made)}, want a click command")
            words = f"{self.name} {made.name} --config FILE {example}".rstrip()
            made.epilog = f"Example: {words}"
            return made

        return decorate

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands with their complete summaries; click would cut long ones."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, one.get_short_help_str(limit=500)) for name, one in commands if one]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command; propose the nearest name for one that is not there."""
        import difflib

        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            if (renamed := COMMANDS.get(f"{self.name} {args[0]}")) is not None:
                raise ConfigError(f"{self.name} {args[0]}: renamed, run `{renamed}`")
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            known = ", ".join(self.list_commands(ctx))
            hint = f"did you mean {near[0]!r}?" if near else f"commands: {known}"
            raise ConfigError(f"{self.name}: unknown command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)


def echo(text: str = "") -> None:
    """Print a result to stdout."""
    click.echo(text)


def run(group: CommandGroup, argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; expected failures are told in one line."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
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
        click.echo(f"error: {where or group.name}: {error.format_message()}", err=True)
        return error.exit_code
    except (MovieNetError, OSError) as error:
        if debug:
            raise
        return _tell(error)
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped from the keyboard", err=True)
        return 130
    return result if isinstance(result, int) else 0


def _tell(error: MovieNetError | OSError) -> int:
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        # The files of a stage are many: say which one the system refused.
        text = f"{error.filename}: {error.strerror}" if error.filename else text
    click.echo(f"error: {text}", err=True)
    return getattr(error, "exit_code", 1)


def _configured(function: Command) -> Command:
    """Turn ``function(config, …)`` into one that click can call."""

    @click.option("--config", "config_path", metavar="FILE", help="YAML file, or a preset's name.")
    @click.option("--print-config", is_flag=True, help="Print the resolved configuration and end.")
    @click.option("--quiet", is_flag=True, help="Warnings and results only.")
    @click.option("--debug", is_flag=True, help="Show tracebacks of expected failures too.")
    @click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
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
        remember_arguments(config_path, overrides)
        config = _load(config_path, overrides)
        if print_config:
            from configs.load import dump_config

            echo(dump_config(config).rstrip())
            return 0
        return function(config, **options)

    return wrapped


def _load(config_path: str | None, overrides: Sequence[str]) -> Config:
    from configs.load import load_config

    if config_path is None:
        raise ConfigError("--config: missing, want a YAML file, e.g. --config configs/demo.yaml")
    return load_config(Path(config_path), overrides)
