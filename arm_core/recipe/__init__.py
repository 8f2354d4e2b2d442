"""Everything that decides how a run turns out, as TOML; the shipped recipes. Imports data and below."""
