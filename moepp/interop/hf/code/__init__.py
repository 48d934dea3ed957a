"""Copied into exported folders, where transformers runs it; nothing here imports it."""
