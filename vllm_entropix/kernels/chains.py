"""What the kernels of chains are told: the stages that each backend's knows, and the numbers of a row."""

_BOTH = ("numba", "triton")
_CPU = ("numba",)
# Stage of ``samplers.chain`` → settings that it reads as numbers of a row, and backends whose kernel knows it. Those of both
# come first, so that a GPU's numbers stand side by side, too.
_KNOWN: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "temperature": (("temperature",), _BOTH),
    "dynatemp": (("dynatemp_range", "dynatemp_exponent"), _BOTH),
    "top_k": (("top_k",), _BOTH),
    "top_p": (("top_p",), _BOTH),
    "min_p": (("min_p",), _BOTH),
    "top_n_sigma": (("top_n_sigma",), _BOTH),
    "typ_p": (("typ_p",), _BOTH),
    "xtc": (("xtc_probability", "xtc_threshold"), _BOTH),
    "dry": ((), _BOTH),
    "epsilon": (("epsilon_cutoff",), _CPU),
    "eta": (("eta_cutoff",), _CPU),
    "edt": (("edt_theta",), _CPU),
    "greedy_threshold": (("greedy_threshold",), _CPU),
    "p_less": ((), _CPU),
    "top_a": (("top_a",), _CPU),
    "quadratic": (("smoothing_factor", "smoothing_curve"), _CPU),
    "penalties": (("repeat_last_n", "repeat_penalty", "frequency_penalty", "presence_penalty"), _CPU),
    "top_h": (("top_h",), _CPU),
    "mirostat": ((), _CPU),
    "mirostat_v2": ((), _CPU),
    "adaptive_p": (("adaptive_target",), _CPU),
    "tfs": (("tfs_z",), _CPU),
}
# As the kernels number them.
STAGES = tuple(_KNOWN)


def stages_of(backend: str) -> tuple[str, ...]:
    """Stages that this backend's kernel knows; none if it has no kernel."""
    return tuple(stage for stage, (_, backends) in _KNOWN.items() if backend in backends)


def numbers_of(backend: str) -> tuple[str, ...]:
    """Columns of the numbers of a row that this backend's kernel reads."""
    return tuple(number for stage in stages_of(backend) for number in _KNOWN[stage][0])
