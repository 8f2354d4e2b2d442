"""Float64 NumPy reference of the operators and of both models: slow, short and authoritative."""
