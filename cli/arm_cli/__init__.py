"""The `arm` command: one file per subcommand, no maths."""
