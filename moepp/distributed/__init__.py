"""Ranks: process groups, layouts, collectives, the exchange of tokens, and leaving together."""
