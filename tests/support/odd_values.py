"""Values that a setting may be given by mistake or in malice."""

from hypothesis import strategies as st

HUGE = 10**5000  # Python writes no number as long as this
LARGE = ["x" * 20_000_000, ["y" * 1_000_000] * 100, {"z" * 1_000_000: 1}, b"w" * 1_000_000, HUGE]
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.none().map(lambda _: HUGE)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
