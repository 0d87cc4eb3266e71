"""The command line, `energy-prior`: one file per command."""
