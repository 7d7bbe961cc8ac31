"""Optimizers: the built-in ones, others' by name, their groups and what is saved of them."""
