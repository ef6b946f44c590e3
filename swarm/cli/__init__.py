"""The command line: the composition root. Roles and torch are imported when a command runs, not before."""
