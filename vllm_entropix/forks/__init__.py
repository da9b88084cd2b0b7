"""Answers that fork: where, which branches there are, and which of them is the answer. Knows records, and no engine."""
