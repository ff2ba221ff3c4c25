"""Trainer that reproduces the SWA paper's recipe: ``swa-fast train``."""
