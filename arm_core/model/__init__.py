"""Models: spec, token orders, parameter table, cost, float64 reference. Imports no other room."""
