"""The command line: one file a subcommand of ``pbe``.

A file holds a settings dataclass, whose fields are the options (the docstring under a field is its help), and
the function that is the command. It imports other rooms inside that function, so that ``--help`` is quick.
"""
