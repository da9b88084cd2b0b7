"""Shows that a change of the code changes no token: records what real engines answer, and compares two recordings."""
