"""The subcommands of `r3`, a module each: it adds its parser and sets `run`.

Import engines and torch inside `run` only: `r3 patch` has to work before they can be imported.
"""
