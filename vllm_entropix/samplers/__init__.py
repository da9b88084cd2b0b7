"""Samplers: each turns a row's logits and what is known of them into a distribution."""
