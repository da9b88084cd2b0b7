"""Entropix: what to do with a row, from entropy and varentropy of its logits and from its attention."""
