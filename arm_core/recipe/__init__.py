"""Recipes: the settings of a run as TOML, and the shipped ones. May import data, engine, files and model."""
