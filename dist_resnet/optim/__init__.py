"""Optimizers: the built-in ones, any other by name, and what is saved of them."""
