"""How kernels are told of rules that settings name."""

# Of the variance over heads: a setting's name → the number that kernels know it by.
VARIANCE_RULES = {"heads": 0, "heads-unbiased": 1, "zero": 2}
