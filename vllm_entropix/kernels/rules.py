"""How kernels are told of rules that settings name."""

# The variance over heads: a setting's name → its number in kernels.
VARIANCE_RULES = {"heads": 0, "heads-unbiased": 1, "zero": 2}
