"""The command line: a file for each subcommand of ``pbe``, or group of them.

A file holds a settings dataclass, whose fields are the options (the docstring under a field is its help), and
the function that is the command. It imports other rooms inside that function, so that ``--help`` is quick.
"""
