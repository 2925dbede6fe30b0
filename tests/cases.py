"""Cases drawn by Hypothesis: any of `nnfwd.cases`, of free shapes or of the pool's."""

from hypothesis import strategies as st

from nnfwd.cases import NAMES, POOL, REGIMES, SPECIALS, Case, Signature

LAYOUTS = ("C", "transposed", "strided", "read-only")

widths = st.one_of(st.integers(1, 8), st.integers(1, 64))
layers = st.tuples(
    st.sampled_from(("dense",) * 8 + ("scale", "activation")),
    widths,
    st.sampled_from(NAMES),
    st.booleans(),
    st.booleans(),
)
free_signatures = st.builds(
    Signature,
    in_features=widths,
    lead=st.sampled_from(((), (1,), (2,), (3,), (0,), (2, 2), (1, 0, 2))),
    layers=st.lists(layers, min_size=1, max_size=5).map(tuple),
    members=st.sampled_from((0, 0, 0, 1, 3)),
)


def cases(dtype: str, signatures: st.SearchStrategy[Signature] = free_signatures) -> st.SearchStrategy[Case]:
    """A network and an input in one dtype."""
    return st.builds(
        Case,
        signature=signatures,
        dtype=st.just(dtype),
        regime=st.sampled_from(REGIMES),
        special=st.sampled_from(("none",) * 4 + SPECIALS),
        seed=st.integers(0, 2**32 - 1),
    )


pool_signatures = st.sampled_from(POOL)
layouts = st.sampled_from(LAYOUTS)
