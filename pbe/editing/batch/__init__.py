"""Many edits in one command: jobs, runner and records."""
