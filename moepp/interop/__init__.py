"""Weights of other formats: released MoE++ checkpoints, Hugging Face exports, dense models."""
