"""Explanations of a model as arrays: influence maps, completions, features of patches."""
