"""What the kernel of chains is told: which stages it knows, and the numbers of a row."""

# Stages of ``samplers.chain``, as the kernel numbers them.
STAGES = ("temperature", "dynatemp", "top_k", "top_p", "min_p", "top_n_sigma", "typ_p", "xtc", "dry")
# Columns of a row's numbers.
NUMBERS = (
    *("temperature", "dynatemp_range", "dynatemp_exponent", "top_k", "top_p"),
    *("min_p", "top_n_sigma", "typ_p", "xtc_probability", "xtc_threshold"),
)
