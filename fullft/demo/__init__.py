"""The built-in demo: a small data set, a short essay and a tiny untrained model."""
