"""What a model looks at and what it predicts, as arrays: influence maps, completions, features of patches."""
