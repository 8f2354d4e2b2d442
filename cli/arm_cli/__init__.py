"""The `arm` command: one file per subcommand, without maths."""
